"""The parts of `python -m benchmarks.model_table`: which architectures of transformers work with which method."""
