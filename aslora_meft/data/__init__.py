"""Training data: from files and the hub to token ids."""
