"""Picks: the experts of a token, and the neurons with the largest scores among them."""
