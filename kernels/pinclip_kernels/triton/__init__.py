"""Triton kernels, one module per op; each imports torch and triton only and can be called alone."""
