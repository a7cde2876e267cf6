"""Where predict.py's texts come from: options, files, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from reformer_lm.corpus.readers import read_articles
from reformer_lm.errors import InputError

BYTE_ORDER_MARK = "\ufeff"


def given_texts(texts: Sequence[str], file: str | None) -> Iterator[str]:
    """All texts of a command line, those of ``--text`` before those of ``--file``.

    Args:
        texts: The values of ``--text``.
        file: The value of ``--file``; "-" is standard input.

    Returns:
        An iterator over the texts as given. A line without text is an empty one, so that results can be laid
        beside the lines of the file.

    Raises:
        InputError: If an option's text is not valid Unicode (at once), or a file is missing, malformed or
            without any text (when it is read).
    """
    for number, text in enumerate(texts, start=1):
        if not _is_unicode(text):
            raise InputError(f"--text number {number} is not valid UTF-8; check the terminal's encoding")
    return _chain(texts, file)


def _chain(texts: Sequence[str], file: str | None) -> Iterator[str]:
    yield from texts
    if file is not None:
        yield from read_texts(file)


def read_texts(file: str) -> Iterator[str]:
    """The texts of one file: lines of a .txt file or of standard input, elements of .json, records of .jsonl.

    Args:
        file: A path, or "-" for standard input.

    Yields:
        One text after the other.

    Raises:
        InputError: If the file is missing, of an unknown format, not valid, or without any text.
    """
    path = Path(file)
    if file == "-":
        yield from _with_text("stdin", _decoded_lines("stdin", sys.stdin.buffer))
    elif path.suffix.lower() in (".json", ".jsonl"):
        yield from read_articles(path)
    elif path.suffix.lower() != ".txt" and path.is_file():
        raise InputError(f"{path}: unknown format {path.suffix!r}; give a .txt, .json or .jsonl file")
    else:
        try:
            lines = path.open("rb")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; give a .txt, .json or .jsonl file, or - for stdin") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
        with lines:
            yield from _with_text(str(path), _decoded_lines(str(path), lines))


def decode_line(line: bytes, name: str = "stdin", offset: int = 0) -> str:
    """Decode one line.

    Args:
        line: Its bytes.
        name: The file, for the error.
        offset: Bytes of the file before the line.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: invalid UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x}); convert it to UTF-8"
        ) from None


def _decoded_lines(name: str, lines: BinaryIO) -> Iterator[str]:
    offset = 0
    for line in lines:
        text = decode_line(line, name, offset)
        yield text.removeprefix(BYTE_ORDER_MARK if offset == 0 else "").rstrip("\r\n")
        offset += len(line)


def _with_text(name: str, texts: Iterable[str]) -> Iterator[str]:
    """Pass texts on, and object at the end if none had any."""
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise InputError(f"{name}: no text in it; write one text a line")


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; bytes that are not UTF-8 reach a program's arguments as surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
