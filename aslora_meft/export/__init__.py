"""Folders and files that other programs load: a saved adapter written so that nothing of this package is needed."""
