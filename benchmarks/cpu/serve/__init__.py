"""Whole models on a CPU, served beside other engines."""
