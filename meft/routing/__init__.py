"""Which neurons a token uses."""
