"""A saved adapter in use: `generate`, `evaluate` and what both load."""
