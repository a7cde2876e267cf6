"""What the examples have in common: they find the package, take --seed, and say in one line what is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# So that an example runs without an installation: each imports this module first.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG_INPUT, CommandLineParser, complain  # noqa: E402
from reformer_lm.errors import InputError  # noqa: E402


def count(text: str) -> int:
    """A whole number of at least 1, for ``type=`` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text!r}")
    return int(text)


def parser_of(description: str | None, steps: int, learning_rate: float) -> CommandLineParser:
    """A parser with the options that every example has.

    Args:
        description: the script's docstring; its first line is shown.
        steps: default number of optimizer steps.
        learning_rate: default of the highest learning rate.
    """
    parser = CommandLineParser(
        bare_argument_hint="every value belongs to an option",
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=count, default=steps, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=learning_rate, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and samples")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs an example as a program: a wrong input is one line and exit status 2."""
    try:
        main()
    except InputError as error:
        complain(error)
        sys.exit(EXIT_WRONG_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_OK)


def begin(seed: int) -> torch.Generator:
    """Seeds torch for initial weights and samples, and gives a generator of its own for the data."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
