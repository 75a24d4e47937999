"""What is kept of the rows, and what is said of them."""
