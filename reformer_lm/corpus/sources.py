"""The files of a corpus: found, described, and read one after the other."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reformer_lm.corpus.files import OnBytes, TextFile, ignore_bytes, open_file
from reformer_lm.corpus.readers import DEFAULT_READING, FORMATS, Reading, format_of, open_articles
from reformer_lm.corpus.token_files import read_npz, read_token_text
from reformer_lm.errors import InputError

SOURCE_FORMATS = (*FORMATS, ".npz")
# A value of Reading.txt_articles that is no choice of the user's: the file holds ids.
TOKEN_IDS = "token ids"


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

    def describes(self, path: str | Path) -> bool:
        """Whether a file has the bytes that this one had.

        A file of the same name, size and time is taken to be the same one; any other is read.

        Raises:
            InputError: If the file is missing or cannot be read.
        """
        try:
            status = Path(path).stat()
        except OSError:
            return fingerprint_source(path) == self
        if status.st_size != self.size:
            return False
        untouched = str(path) == self.path and status.st_mtime_ns == self.modified_ns
        return untouched or fingerprint_source(path).sha256 == self.sha256


def fingerprint_source(path: str | Path) -> SourceFile:
    """Describe a source file by size, time and checksum.

    Args:
        path: An existing file.

    Raises:
        InputError: If the file is missing or cannot be read.
    """
    with open_file(Path(path)) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a file is one
    status = Path(path).stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns, digest)


def find_files(paths: Sequence[str]) -> list[Path]:
    """The corpus files behind names of files, folders (searched through) and patterns such as ``texts/*.jsonl``.

    Args:
        paths: In this order, and each one's files sorted by name. A file that is met twice is taken once.

    Returns:
        At least one file.

    Raises:
        InputError: If a name stands for no file that can be read.
    """
    found: dict[Path, Path] = {}
    for name in paths:
        for path in _files_behind(name):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _files_behind(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise InputError(f"{name}: no corpus file in this folder; it must hold {', '.join(SOURCE_FORMATS)}")
        return files
    if path.exists() or not glob.has_magic(name):
        # What is missing or of no known format is refused by its reader.
        return [path]
    matches = [Path(match) for match in glob.glob(name, recursive=True)]  # noqa: PTH207  # Path.glob takes no absolute one
    files = [file for match in matches for file in (_files_below(match) if match.is_dir() else [match])]
    if not files:
        raise InputError(f"{name}: no file has such a name; give a file, a folder or another pattern")
    return sorted(set(files), key=str)


def _files_below(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*")
        if format_of(path) in SOURCE_FORMATS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return sorted(files, key=str)


@dataclass(frozen=True)
class Place:
    """A place between two articles of a corpus.

    Attributes:
        file: Number of the file, from 0.
        article: Number of the article in it, from 0.
    """

    file: int = 0
    article: int = 0


class CorpusSource:
    """The articles of one or many files, which can be read from any place on.

    Args:
        paths: Files, folders and patterns, or files that are known.
        reading: Fields, separators and encoding.
        begin_id: The token that begins an article, where files hold token ids.

    Raises:
        InputError: If a name stands for no file that can be read.
    """

    def __init__(
        self, paths: Sequence[str | Path], reading: Reading = DEFAULT_READING, begin_id: int | None = None
    ) -> None:
        self.files = find_files([str(path) for path in paths])
        self.reading = reading
        self._begin_id = begin_id
        for number in range(len(self.files)):
            # Missing files and unknown formats are found now, not after hours of tokenising.
            if not self.files[number].exists() or format_of(self.files[number]) not in SOURCE_FORMATS:
                self._open(number, ignore_bytes)

    @cached_property
    def sources(self) -> tuple[SourceFile, ...]:
        """Descriptions of all files, which reads every byte once."""
        return tuple(fingerprint_source(path) for path in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def name(self) -> str:
        """The file, or how many there are, for messages."""
        return str(self.files[0]) if len(self.files) == 1 else f"{len(self.files):,} files from {self.files[0]} on"

    def articles(
        self, start: Place | None = None, on_bytes: OnBytes = ignore_bytes
    ) -> Iterator[tuple[Place, str | np.ndarray]]:
        """Iterate over the articles.

        Args:
            start: Leave out what is before; whole files before are not even opened.
            on_bytes: Told how many bytes were read or left out.

        Yields:
            The place behind the article, and the article: a text, or token ids as int64 [tokens].

        Raises:
            InputError: What the readers raise.
        """
        start = start or Place()
        on_bytes(sum(path.stat().st_size for path in self.files[: start.file]))
        for file in range(start.file, len(self.files)):
            skipped = start.article if file == start.file else 0
            for number, article in enumerate(self._open(file, on_bytes)):
                if number >= skipped:
                    yield Place(file, number + 1), article

    def _open(self, file: int, on_bytes: OnBytes) -> Iterator[str | np.ndarray]:
        path = self.files[file]
        is_token_text = self.reading.txt_articles == TOKEN_IDS and format_of(path) == ".txt"
        if not is_token_text and format_of(path) != ".npz":
            return open_articles(path, self.reading, on_bytes)
        if self._begin_id is None:
            raise InputError(f"{path}: holds token ids, but articles are wanted; give a file of text")
        if is_token_text:
            return read_token_text(TextFile(path, self.reading.encoding, on_bytes), self._begin_id)
        return read_npz(path, self._begin_id, on_bytes)
