"""The `vxl` command. It imports torch and the model only when a command needs them."""
