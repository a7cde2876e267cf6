"""Read one JSON array of strings, however large, an element at a time.

Python's json module wants a whole document in memory. Here a window of the text moves over the file; the
module's own scanner reads each string in it, and what it says of a mistake is carried back to the file's lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from reformer_lm.corpus.files import TextFile
from reformer_lm.errors import InputError

# What JSON calls its types, for messages about a file that someone wrote as JSON, not as Python.
JSON_TYPE_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_SPACES = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# An escape such as \ud83d\ude00 that the window's end cuts off looks like a mistake so close to the end.
_LONGEST_ESCAPE = 12
# Enough of a value that should not be there to tell what it is.
_LONGEST_ODDITY = 1000


def json_type_name(value: Any) -> str:
    """What JSON calls the type of a value that was read from it."""
    return JSON_TYPE_NAMES[type(value)]


def read_json_array(file: TextFile) -> Iterator[str]:
    """Iterate over the strings of a file that is one JSON array of strings.

    Memory is bounded by the longest string, not by the file.

    Args:
        file: The file.

    Yields:
        One string after the other.

    Raises:
        InputError: If the text is no JSON (line and column are named), no array, or an element is no string (its
            number is named, counted from 1).
    """
    window = _Window(file)
    window.skip_spaces()
    if not window.character:
        raise InputError(f"{file.path}: the file is empty; it must hold a JSON list of strings, one article each")
    if window.character != "[":
        kind = window.kind_of_value()
        raise InputError(f"{file.path}: the JSON is {kind}; it must be a list of strings, one article each")
    window.step()
    number = 0
    while number or window.character != "]":
        number += 1
        if window.character != '"':
            kind = window.kind_of_value()
            raise InputError(
                f"{file.path}: element {number} is {kind}; the file must be a list of strings, one article each"
            )
        yield window.take_string()
        window.skip_spaces()
        if window.character == "]":
            break
        if window.character != ",":
            window.fail("Expecting ',' delimiter")
        window.step()
    window.step()
    if window.character:
        window.fail("Extra data")


class _Window:
    """The part of the file that is in memory, and the place in it."""

    def __init__(self, file: TextFile) -> None:
        self._path = file.path
        self._chunks = file.chunks()
        self._text = ""
        self._position = 0
        # Where the window's first character stands in the file: its line, and the characters before it there.
        self._line = 1
        self._column = 0

    @property
    def character(self) -> str:
        """The character at the place, "" at the end of the file."""
        return self._text[self._position : self._position + 1]

    def step(self) -> None:
        """Move over one character and the spaces behind it."""
        self._position += 1
        self.skip_spaces()

    def skip_spaces(self) -> None:
        """Move to the next character that is no space."""
        while True:
            match = _SPACES.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or not self._extend(1):
                return

    def take_string(self) -> str:
        """Read the string that begins at the place, and move behind it."""
        while True:
            try:
                value, self._position = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_ESCAPE
                # Twice as much each time, so that a long string is not read from its start too often.
                if not (cut_off and self._extend(len(self._text) - self._position)):
                    self.fail(error.msg, error.pos)
            else:
                return str(value)

    def kind_of_value(self) -> str:
        """What the value at the place is, if it is JSON at all."""
        if self.character == "{":
            return "an object"
        if self.character == "[":
            return "an array"
        if len(self._text) - self._position < _LONGEST_ODDITY:
            self._extend(_LONGEST_ODDITY)
        try:
            value, _ = _DECODER.raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            self.fail(error.msg, error.pos)
        except ValueError:
            # A number of thousands of digits.
            return "a number"
        return json_type_name(value)

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Report invalid JSON at a position of the window, by default at the place."""
        position = self._position if position is None else position
        newline = self._text.rfind("\n", 0, position)
        line = self._line + self._text.count("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position + 1
        raise InputError(f"{self._path}: invalid JSON at line {line} column {column}: {message}") from None

    def _extend(self, characters: int) -> bool:
        """Drop what lies behind and read at least so many characters more; without effect at the file's end."""
        parts: list[str] = []
        read = 0
        for chunk in self._chunks:
            parts.append(chunk)
            read += len(chunk)
            if read >= characters:
                break
        if not parts:
            return False
        passed = self._text[: self._position]
        newline = passed.rfind("\n")
        self._line += passed.count("\n")
        self._column = len(passed) - newline - 1 if newline >= 0 else self._column + len(passed)
        self._text = "".join([self._text[self._position :], *parts])
        self._position = 0
        return True
