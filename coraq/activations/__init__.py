"""Quantized activations: which tensors have a grid, how it acts, and how many bits it has."""
