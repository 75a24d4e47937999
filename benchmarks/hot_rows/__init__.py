"""What a tier of rows on the device saves on a recorded trace of routing."""
