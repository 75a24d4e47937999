"""The bound of a step of a 7B model on a 24 GB card."""
