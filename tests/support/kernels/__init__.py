"""Checks of kernels that hold on any device, and kernels with one changed line that they must notice."""
