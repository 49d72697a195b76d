"""Run the command line as ``python -m safeglasses``."""

import sys

from safeglasses.cli import main

if __name__ == "__main__":
    sys.exit(main())
