"""Gradients that hold the touched rows alone, and their way to the host."""
