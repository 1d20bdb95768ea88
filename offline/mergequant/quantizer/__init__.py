"""The method in order: a model in, a checkpoint out, block by block."""
