"""Optimizer steps on rows, by which rule and across ranks."""
