"""Everything that is measured on CPUs: `python -m benchmarks.cpu linear|serve|profile`."""
