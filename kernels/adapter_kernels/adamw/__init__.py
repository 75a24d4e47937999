"""AdamW on single rows of a table."""
