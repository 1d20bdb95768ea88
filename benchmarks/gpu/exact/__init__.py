"""Whether every kernel is exact on this GPU."""
