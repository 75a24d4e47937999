"""MEFT's step beside what other libraries offer for as many values: `benchmarks.peer_optimizers`."""
