"""Read articles from the files people train on: GPT2-Chinese's JSON, JSON lines, plain text, Parquet.

Every mistake in a file is reported as one line that says where it is, because a corpus is usually too large
to search by eye. Nothing is read whole: memory is bounded by the longest article.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reformer_lm.corpus.files import OnBytes, TextFile, ignore_bytes, open_file
from reformer_lm.corpus.json_array import json_type_name, read_json_array
from reformer_lm.corpus.parquet import read_parquet
from reformer_lm.errors import InputError

TEXT_FORMATS = (".json", ".jsonl", ".txt")
FORMATS = (*TEXT_FORMATS, ".parquet")
# Where an article of a .txt file ends.
TXT_ARTICLES = ("blank", "line", "file")


@dataclass(frozen=True)
class Reading:
    """How files are read, where there is a choice.

    Attributes:
        text_field: Field of a JSON line, or column of a Parquet file, that holds the article.
        txt_articles: Articles of a .txt file: separated by ``blank`` lines, one a ``line``, or the whole ``file``.
        encoding: Of text files: ``utf-8`` or ``gb18030``.
    """

    text_field: str = "text"
    txt_articles: str = "blank"
    encoding: str = "utf-8"


DEFAULT_READING = Reading()


def format_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case; .gz behind a text format's is left out."""
    name = path.name.lower()
    if name.endswith(".gz") and Path(name[:-3]).suffix in TEXT_FORMATS:
        name = name[:-3]
    return Path(name).suffix


def read_articles(
    path: str | Path, reading: Reading = DEFAULT_READING, on_bytes: OnBytes = ignore_bytes
) -> Iterator[str]:
    """Iterate over the articles of one corpus file.

    Formats, told apart by the file's ending: ``.json`` is GPT2-Chinese's array of strings, one article each;
    ``.jsonl`` has one ``{"text": "..."}`` or one string a line; ``.txt`` has articles separated by blank
    lines; ``.parquet`` has one a row. The first three may be packed (``.json.gz``) and have a byte order mark.
    An article comes back as written, an empty one too.

    Args:
        path: The corpus file.
        reading: Fields, separators and encoding, where they are others than these.
        on_bytes: Told how many bytes of the file were read.

    Yields:
        One article after the other.

    Raises:
        InputError: If the file is missing, of an unknown format, of another encoding, no valid JSON, of the
            wrong shape, or holds no text at all.
    """
    # Opened here and not at the first step of the iteration, so that a missing file is found at once.
    return _with_text(Path(path), open_articles(Path(path), reading, on_bytes))


def open_articles(path: Path, reading: Reading, on_bytes: OnBytes = ignore_bytes) -> Iterator[str]:
    """As `read_articles`, of a file that may be empty of text: one of many."""
    kind = format_of(path)
    if kind == ".parquet":
        return read_parquet(path, reading.text_field, on_bytes)
    if kind not in TEXT_FORMATS:
        open_file(path).close()
        raise InputError(f"{path}: unknown format {path.suffix!r}; give a {', '.join(FORMATS[:-1])} or .parquet file")
    file = TextFile(path, reading.encoding, on_bytes)
    if kind == ".json":
        return read_json_array(file)
    if kind == ".jsonl":
        return _read_json_lines(file, reading.text_field)
    if reading.txt_articles == "file":
        return _read_whole(file)
    lines = (line.rstrip("\r") for line in file.lines())
    return _separated_by_blank_lines(lines) if reading.txt_articles == "blank" else filter(str.strip, lines)


def _with_text(path: Path, articles: Iterator[str]) -> Iterator[str]:
    """Pass articles on, and object at the end if none had any text."""
    found_text = False
    for article in articles:
        found_text = found_text or bool(article.strip())
        yield article
    if not found_text:
        raise InputError(f"{path}: no article with any text in it; the corpus is empty")


def _read_json_lines(file: TextFile, field: str) -> Iterator[str]:
    for number, line in enumerate(file.lines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip("\r"))
        except json.JSONDecodeError as error:
            raise InputError(f"{file.path}: invalid JSON at line {number} column {error.colno}: {error.msg}") from None
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
            raise InputError(f"{file.path}: invalid JSON at line {number}: {reason}") from None
        article = record.get(field) if isinstance(record, dict) else record
        if not isinstance(article, str):
            kind = json_type_name(record)
            what = f"{kind} without a string {field!r}" if isinstance(record, dict) else kind
            hint = "; --text_field names another field" if isinstance(record, dict) else ""
            raise InputError(
                f'{file.path}: line {number} is {what}; each line must be {{"{field}": "one article"}}{hint}'
            )
        yield article


def _read_whole(file: TextFile) -> Iterator[str]:
    article = "".join(file.chunks()).strip("\r\n")
    if article:
        yield article


def _separated_by_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if line.strip():
            article.append(line)
        elif article:
            yield "\n".join(article)
            article = []
    if article:
        yield "\n".join(article)
