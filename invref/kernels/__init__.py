"""Kernels of the layers: the readable ones, the fast ones, and the packing of side bits."""
