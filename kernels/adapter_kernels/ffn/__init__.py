"""The sparse FFN over gathered rows, forward and backward."""
