"""`python -m ebt_vision`: the command line."""

import sys

from ebt_vision.cli import main

if __name__ == "__main__":
    sys.exit(main())
