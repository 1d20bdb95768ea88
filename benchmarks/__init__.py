"""Measurements, with results under `results/`. Nothing here is imported by the packages."""
