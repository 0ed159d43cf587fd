"""The attention operation and its Triton kernels."""
