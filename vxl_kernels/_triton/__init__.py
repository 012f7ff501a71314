"""The Triton kernels. Nothing here is imported before one of them is called."""
