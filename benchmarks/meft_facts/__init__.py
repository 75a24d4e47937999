"""How well MEFT learns facts, and by what: its routing, its factor, its row rule, its size."""
