"""`python -m prune_callbacks.reporting runs/a runs/b --output compare.html`: one page that compares runs."""

import sys

from prune_callbacks.reporting.comparison import main

sys.exit(main(sys.argv[1:]))
