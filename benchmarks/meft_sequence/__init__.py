"""What a model keeps of the first tasks of a sequence: MEFT whose tasks own rows, LoRA, and a dense adapter."""
