"""Measurements: a folder a question; see README.md."""
