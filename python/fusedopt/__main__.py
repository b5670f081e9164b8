"""``python -m fusedopt`` and the console script; the commands are in ``cli``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
