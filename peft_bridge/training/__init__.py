"""Steps of optimizers and runs of trainers, and who is told of them."""
