"""Everything that is measured on a GPU, one part a file: `python -m benchmarks.gpu PART...`."""
