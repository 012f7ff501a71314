"""`python -m vxl_eval`, which is `vxl eval`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
