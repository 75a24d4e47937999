"""The parts of `benchmarks/make_model_table.py`: which architectures of transformers work with which method."""
