"""`python -m prune_callbacks.reporting runs/a runs/b --output compare.html`: one page that compares runs."""

import sys

from prune_callbacks.reporting.comparison import main

if __name__ == "__main__":  # the module may be imported too
    sys.exit(main(sys.argv[1:]))
