"""Generate text with a trained model, or score texts with --ppl: the front door to reformer_lm.prediction."""

import sys

from reformer_lm.prediction import main

if __name__ == "__main__":
    sys.exit(main())
