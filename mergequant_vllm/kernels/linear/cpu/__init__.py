"""Linears on CPUs: packed codes through native kernels, or floats in which sums are exact."""
