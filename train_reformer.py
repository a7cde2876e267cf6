"""Train a Reformer language model on Chinese text: ``python train_reformer.py --help``."""

import sys

from reformer_lm.training import main

if __name__ == "__main__":
    sys.exit(main())
