"""What a user types: the arguments of the commands, built from the configs, and their checks."""
