"""What surrounds a training run: checkpoints, interruption, the printed summary, what is written at its end."""
