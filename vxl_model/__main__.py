"""`python -m vxl_model` is `vxl`. The command is looked up by name: it lies above the model."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vxl_cli", run_name="__main__", alter_sys=True)
