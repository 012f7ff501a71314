"""Benchmarks of the kernels, the cache and the whole model; the files here are the commands."""
