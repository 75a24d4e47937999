"""What an adapter costs: bytes, seconds, and what fits."""
