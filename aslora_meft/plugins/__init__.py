"""Parts of this package that other programs load; each needs its program."""
