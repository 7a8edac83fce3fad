"""`deepspeed train.py --config configs/NAME.toml`: train one run, evaluate it, write its report."""

import sys

from pinclip.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
