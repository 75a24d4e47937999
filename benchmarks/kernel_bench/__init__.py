"""How fast are the kernels beside what the machine and torch can do? Run by `benchmarks.kernel_bench`."""
