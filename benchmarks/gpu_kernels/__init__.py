"""Counts of the GPU kernels, and the model that rests on them."""
