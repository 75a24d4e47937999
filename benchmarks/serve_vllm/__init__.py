"""Whether vLLM gives the tokens of an exported MEFT model."""
