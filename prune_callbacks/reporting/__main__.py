"""Runs `python -m prune_callbacks.reporting runs/a runs/b --output compare.html`: writes a page that compares runs."""

import sys

from prune_callbacks.reporting.comparison import main

if __name__ == "__main__":  # importing the module must not run it
    sys.exit(main(sys.argv[1:]))
