"""`python -m torch_mbv2`: the command line."""

from __future__ import annotations

import sys

from torch_mbv2.cli import main

if __name__ == "__main__":
    sys.exit(main())
