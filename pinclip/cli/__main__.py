"""`python -m pinclip.cli` is `pinclip`."""

import sys

from pinclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
