"""How fast a layer of MEFT is on a CPU, and its parts."""
