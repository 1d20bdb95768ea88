"""Linears on GPUs through a Triton program of this project."""
