"""Read articles from the files people train on: GPT2-Chinese's JSON, JSON lines, plain text.

Every mistake in a file is reported as one line that says where it is, because a corpus is usually too large
to search by eye.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from reformer_lm.errors import InputError

FORMATS = (".json", ".jsonl", ".txt")

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


@dataclass(frozen=True)
class SourceFile:
    """One file that a corpus was read from, so that a later run can tell whether it changed.

    Attributes:
        path: As the user gave it.
        size: Bytes.
        modified_ns: Time of the last change, in nanoseconds since 1970.
        sha256: Checksum of the bytes.
    """

    path: str
    size: int
    modified_ns: int
    sha256: str


def fingerprint_source(path: str | Path) -> SourceFile:
    """Describe a source file by size, time and checksum.

    Args:
        path: An existing file.

    Raises:
        InputError: If the file is missing or cannot be read.
    """
    with _open(Path(path)) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = Path(path).stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns, digest)


def read_articles(path: str | Path) -> Iterator[str]:
    """Iterate over the articles of one corpus file.

    Formats, told apart by the file's ending: ``.json`` is GPT2-Chinese's array of strings, one article each;
    ``.jsonl`` has one ``{"text": "..."}`` or one string a line; ``.txt`` has articles separated by blank
    lines. All are UTF-8, with or without a byte order mark. An article comes back as written, an empty one
    too.

    Args:
        path: The corpus file.

    Yields:
        One article after the other.

    Raises:
        InputError: If the file is missing, of an unknown format, no UTF-8, no valid JSON, of the wrong shape,
            or holds no text at all.
    """
    path = Path(path)
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".txt": _read_text}
    if path.suffix.lower() not in readers:
        _open(path).close()
        raise InputError(f"{path}: unknown format {path.suffix!r}; give a {', '.join(FORMATS[:-1])} or .txt file")
    # Opened here and not at the first step of the iteration, so that a missing file is found at once.
    return _with_text(path, readers[path.suffix.lower()](path, _open(path)))


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a .json, .jsonl or .txt corpus") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; give the path of one corpus file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _with_text(path: Path, articles: Iterator[str]) -> Iterator[str]:
    """Pass articles on, and object at the end if none had any text."""
    found_text = False
    for article in articles:
        found_text = found_text or bool(article.strip())
        yield article
    if not found_text:
        raise InputError(f"{path}: no article with any text in it; the corpus is empty")


def _decode(path: Path, data: bytes, offset: int) -> str:
    """Decode UTF-8 that begins ``offset`` bytes into the file."""
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: invalid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            "convert the file to UTF-8, for example with: iconv -f GB18030 -t UTF-8"
        ) from None


def _parse(path: Path, text: str, line_offset: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: invalid JSON at line {line_offset + error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: the JSON is nested too deeply; it must be a list of strings") from None


def _type_name(value: Any) -> str:
    return JSON_TYPE_NAMES[type(value)]


def _read_json(path: Path, file: BufferedReader) -> Iterator[str]:
    with file:
        text = _decode(path, file.read(), 0)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a JSON list of strings, one article each")
    articles = _parse(path, text)
    if not isinstance(articles, list):
        raise InputError(f"{path}: the JSON is {_type_name(articles)}; it must be a list of strings, one article each")
    for number, article in enumerate(articles, start=1):
        if not isinstance(article, str):
            raise InputError(
                f"{path}: element {number} of {len(articles)} is {_type_name(article)}; "
                "the file must be a list of strings, one article each"
            )
    yield from articles


def _read_lines(path: Path, file: BufferedReader) -> Iterator[str]:
    """Decode line by line, so that memory does not grow with the file."""
    offset = 0
    with file:
        for line in file:
            yield _decode(path, line, offset)
            offset += len(line)


def _read_json_lines(path: Path, file: BufferedReader) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path, file), start=1):
        if not line.strip():
            continue
        record = _parse(path, line.rstrip("\r\n"), line_offset=number - 1)
        article = record.get("text") if isinstance(record, dict) else record
        if not isinstance(article, str):
            what = f"{_type_name(record)} without a string 'text'" if isinstance(record, dict) else _type_name(record)
            raise InputError(f'{path}: line {number} is {what}; each line must be {{"text": "one article"}}')
        yield article


def _read_text(path: Path, file: BufferedReader) -> Iterator[str]:
    lines: list[str] = []
    for line in _read_lines(path, file):
        line = line.rstrip("\r\n")
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
