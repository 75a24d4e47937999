"""Which form of reading keys is the fastest for an exported MEFT model on a CPU."""
