"""Train a Reformer language model on Chinese text: ``python train_reformer.py --help``."""

import sys

if __name__ == "__main__":
    # Here, because processes that tokenise import this file, too, and need none of it.
    from reformer_lm.training import main

    sys.exit(main())
