"""What the command lines of the two programs share: one-line errors that name the option probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from reformer_lm.errors import InputError

EXIT_OK = 0
EXIT_WRONG_INPUT = 2
# What a shell reports for a program that a signal ended: this and the signal's number.
EXIT_SIGNAL = 128
EXIT_INTERRUPTED = EXIT_SIGNAL + 2


def complain(error: object) -> None:
    """Prints an error on stderr, in one line whatever its message."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like ``name``: one that begins with it, else the most similar one."""
    names = list(known)
    begun = [candidate for candidate in names if candidate.startswith(name)]
    return min(begun, key=len) if begun else difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


class CommandLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and which accepts no abbreviations.

    Args:
        bare_argument_hint: What to do with a word that belongs to no option; ``{word}`` stands for it.
    """

    def __init__(self, *, bare_argument_hint: str, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]  # argparse's own keywords
        self._bare_argument_hint = bare_argument_hint

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print.

        Args:
            message: What is wrong.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{message}; see --help")

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses, and explains what is not known.

        Args:
            argv: The arguments; None for the program's own.

        Returns:
            The values by name.

        Raises:
            InputError: An option is unknown, or a value is missing or wrong.
        """
        arguments, unknown = self.parse_known_args(argv)
        if not unknown:
            return arguments
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not options:
            hint = self._bare_argument_hint.format(word=repr(unknown[0]))
            raise InputError(f"unexpected argument {unknown[0]!r}; {hint}")
        known = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        # Options have underscores here, as in GPT2-Chinese, and hyphens in many other programs.
        written = "--" + options[0].lstrip("-").replace("-", "_")
        raise InputError(f"unknown option {options[0]}; did you mean {nearest_name(written, known)}?")
