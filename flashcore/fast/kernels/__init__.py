"""Triton kernels and the jit primitives they are assembled from; nothing else lives here."""
