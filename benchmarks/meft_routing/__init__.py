"""How MEFT's router spreads tokens over its experts during a long run."""
