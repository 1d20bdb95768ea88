"""Which kernels a decoder block runs on a GPU."""
