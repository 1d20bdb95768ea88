"""Whole models on a GPU, served in several forms."""
