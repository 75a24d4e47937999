"""How many answers that it was trained on does a model with MEFT give back? Run by `benchmarks.meft_recall`."""
