"""Which rows a step may update: those specific to the new data, and those that no earlier task owns."""
