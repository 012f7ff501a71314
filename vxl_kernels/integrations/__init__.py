"""vxl in other people's libraries. Nothing here is imported by `vxl_kernels` itself."""
