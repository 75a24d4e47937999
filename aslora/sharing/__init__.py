"""Which layers share one B, and how they come to: shared tensors, merges, and the run that takes them."""
