"""`python -m reformer_lm.convert`."""

from __future__ import annotations

import sys

from reformer_lm.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
