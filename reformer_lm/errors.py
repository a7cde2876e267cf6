"""The one exception that means "the user's input is wrong"."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave (a file, a flag, a configuration key) cannot be used.

    The message is one line that says what was wrong, where, and what to do about it. Both command line
    programs print it as ``error: ...`` and exit with status 2.
    """
