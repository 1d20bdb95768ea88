"""The product of activation codes and weight codes: `reference.py` defines, kernels equal it."""
