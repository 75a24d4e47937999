"""Steps of optimizers and runs of trainers, and their listeners."""
