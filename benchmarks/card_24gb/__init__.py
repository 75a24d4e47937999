"""What does a step of a 7B model take on one 24 GB card, beside every other way? Run by `benchmarks.card_24gb`."""
