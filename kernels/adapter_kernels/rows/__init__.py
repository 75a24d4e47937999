"""Rows of tables: the union of what tokens picked, and copies of it."""
