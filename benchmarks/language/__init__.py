"""The language model of the benchmarks of quality, adapters for it, and what they learn."""
