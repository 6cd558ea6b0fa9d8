"""`python -m minids` is the `minids` command."""

import sys

from minids.cli import main

if __name__ == "__main__":
    sys.exit(main())
