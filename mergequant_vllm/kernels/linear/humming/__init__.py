"""Linears on GPUs through the kernels of the package humming."""
