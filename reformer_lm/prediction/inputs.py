"""Where predict.py's texts come from: options, files, standard input."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reformer_lm.corpus.files import ENCODING_NAMES, TextFile, open_file
from reformer_lm.corpus.readers import Reading, format_of, read_articles
from reformer_lm.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
STDIN = "-"
TABLES = {".csv": ",", ".tsv": "\t"}
FORMATS = ".txt, .json, .jsonl, .csv, .tsv or .parquet"
# A cell may be a whole document; the module's own limit is 128 KB.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class FileOptions:
    """How a file of texts is read, where there is a choice.

    Attributes:
        field: Of a JSON line, or column of a Parquet file, that holds the text.
        column: Of a .csv or .tsv: its name in the first row, or its number from 1, and then there is no such row.
        encoding: ``utf-8`` or ``gb18030``.
    """

    field: str = "text"
    column: str = "text"
    encoding: str = "utf-8"


DEFAULT_OPTIONS = FileOptions()


def given_texts(texts: Sequence[str], file: str | None, options: FileOptions = DEFAULT_OPTIONS) -> Iterator[str]:
    """All texts of a command line, those of ``--text`` before those of ``--file``.

    Args:
        texts: The values of ``--text``.
        file: The value of ``--file``; "-" is standard input.
        options: How to read the file.

    Returns:
        An iterator over the texts as given. A line without text is an empty one, so that results can be laid
        beside the lines of the file.

    Raises:
        InputError: If an option's text is not valid Unicode (at once), or a file is missing, malformed or
            without any text (when it is read).
    """
    require_unicode(texts, "--text")
    return _chain(texts, file, options)


def require_unicode(texts: Sequence[str], option: str) -> None:
    """Object to texts that cannot be encoded: bytes that are not UTF-8 reach a program's arguments as surrogates.

    Args:
        texts: Values of an option.
        option: Its name.

    Raises:
        InputError: If there is such a text.
    """
    for number, text in enumerate(texts, start=1):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{option} number {number} is not valid UTF-8; check the terminal's encoding") from None


def _chain(texts: Sequence[str], file: str | None, options: FileOptions) -> Iterator[str]:
    yield from texts
    if file is not None:
        yield from read_texts(file, options)


def read_texts(file: str, options: FileOptions = DEFAULT_OPTIONS) -> Iterator[str]:
    """The texts of one file: lines of a .txt file or of standard input, elements of .json, records of .jsonl, cells.

    Args:
        file: A path, or "-" for standard input. Text files may be packed: .txt.gz.
        options: How to read it.

    Yields:
        One text after the other; a file of any size is read a piece at a time.

    Raises:
        InputError: If the file is missing, of an unknown format or encoding, not valid, or without any text.
    """
    path = Path(file)
    kind = format_of(path.with_suffix("") if _is_packed_table(path) else path)
    if file == STDIN:
        yield from _with_text("stdin", _decoded_lines("stdin", sys.stdin.buffer, options.encoding))
    elif kind in (".json", ".jsonl", ".parquet"):
        yield from read_articles(path, Reading(text_field=options.field, encoding=options.encoding))
    elif kind in TABLES:
        yield from _with_text(file, _read_table(TextFile(path, options.encoding), TABLES[kind], options.column))
    elif kind == ".txt":
        lines = TextFile(path, options.encoding).lines()
        yield from _with_text(file, (line.rstrip("\r") for line in lines))
    else:
        open_file(path).close()
        raise InputError(f"{path}: unknown format {path.suffix!r}; give a {FORMATS} file, or - for lines of stdin")


def _is_packed_table(path: Path) -> bool:
    return path.suffix.lower() == ".gz" and format_of(path.with_suffix("")) in TABLES


def _read_table(file: TextFile, delimiter: str, column: str) -> Iterator[str]:
    # Tabs divide a .tsv whatever stands between them: quotation marks in it belong to the text.
    lines = (line + "\n" for line in file.lines())
    if delimiter == "\t":
        rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
    place = int(column) - 1 if column.isdecimal() else -1
    try:
        for row in rows:
            if place < 0 and not column.isdecimal():
                if column not in row:
                    raise InputError(
                        f"{file.path}: no column {column!r} in the first row ({', '.join(row)[:200]}); "
                        "name one of them with --column, or give its number"
                    )
                place = row.index(column)
            elif not row:
                yield ""
            elif place < 0 or place >= len(row):
                raise InputError(
                    f"{file.path}: line {rows.line_num} has {len(row)} columns and no number {place + 1}; "
                    "give another --column or mend the line"
                )
            else:
                yield row[place]
    except csv.Error as error:
        raise InputError(f"{file.path}: line {rows.line_num}: {error}; mend the quotation marks there") from None


def decode_line(line: bytes, name: str = "stdin", offset: int = 0, encoding: str = "utf-8") -> str:
    """Decode one line.

    Args:
        line: Its bytes.
        name: The file, for the error.
        offset: Bytes of the file before the line.
        encoding: ``utf-8`` or ``gb18030``.

    Raises:
        InputError: If it is of another encoding.
    """
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: invalid {ENCODING_NAMES[encoding]} at byte {offset + error.start} (0x{line[error.start]:02x}); "
            f"give {' or '.join(ENCODING_NAMES.values())}, the latter with --encoding gb18030"
        ) from None


def _decoded_lines(name: str, lines: BinaryIO, encoding: str) -> Iterator[str]:
    offset = 0
    for line in lines:
        text = decode_line(line, name, offset, encoding)
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
