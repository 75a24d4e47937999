"""What a training step will need, from a model's config alone: no weights, no GPU, nothing run."""
