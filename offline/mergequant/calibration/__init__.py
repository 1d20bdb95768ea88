"""Calibration: the text, and what is counted of the activations that it causes."""
