"""What ranks that share one copy of MEFT's rows take in memory, bytes between them and time."""
