"""Whether the engine trains as the plain formula does."""
