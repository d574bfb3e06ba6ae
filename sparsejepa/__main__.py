"""`python -m sparsejepa`."""

import sys

from sparsejepa.cli import main

if __name__ == "__main__":
    sys.exit(main())
