"""The quantizers of activations on a GPU."""
