"""What a model forgets while it learns facts by heart: LoRA, a dense adapter, MEFT, and MEFT with `train_rows`."""
