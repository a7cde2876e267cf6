"""Open a corpus file and decode it a piece at a time, so that memory does not grow with the file."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from reformer_lm.errors import InputError

ENCODINGS = ("utf-8", "gb18030")
ENCODING_NAMES = {"utf-8": "UTF-8", "gb18030": "GB18030"}
ENCODING_REMEDIES = {
    "utf-8": "convert the file to UTF-8, for example with: iconv -f GB18030 -t UTF-8 (or give --encoding gb18030)",
    "gb18030": "leave --encoding gb18030 out if the file is UTF-8",
}
BYTE_ORDER_MARK = "\ufeff"
# Bytes read at a time: much more than a system call costs, much less than memory.
CHUNK_BYTES = 1 << 20

# Told of bytes as they are read.
OnBytes = Callable[[int], object]


def ignore_bytes(count: int) -> None:
    """Keep no account."""


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        InputError: If it is missing, a folder or unreadable.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a .json, .jsonl, .txt, .parquet or .npz") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; give the path of one corpus file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


class TextFile:
    """A text file, opened at once (so that a missing one is found at once) and decoded as it is read.

    Args:
        path: The file; one that ends in .gz is unpacked.
        encoding: ``utf-8`` or ``gb18030``; a byte order mark is skipped.
        on_bytes: Told how many bytes of the file were read, packed ones where it is packed.

    Raises:
        InputError: If the file cannot be opened.
    """

    def __init__(self, path: Path, encoding: str = "utf-8", on_bytes: OnBytes = ignore_bytes) -> None:
        self.path = path
        self._encoding = encoding
        self._on_bytes = on_bytes
        self._file = open_file(path)
        self._is_packed = path.suffix.lower() == ".gz"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def chunks(self) -> Iterator[str]:
        """Decode the file, about a mebibyte at a time.

        Raises:
            InputError: If a byte is not of the encoding (its offset is named), or a packed file is damaged.
        """
        decoder = codecs.getincrementaldecoder(self._encoding)()
        offset = 0
        at_start = True
        for data in self._data():
            # What was left over of a character that the last chunk cut in two.
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, not data)
            except UnicodeDecodeError as error:
                name = ENCODING_NAMES[self._encoding]
                raise InputError(
                    f"{self.path}: invalid {name} at byte {offset - pending + error.start} "
                    f"(0x{error.object[error.start]:02x}); {ENCODING_REMEDIES[self._encoding]}"
                ) from None
            offset += len(data)
            if text and at_start:
                at_start = False
                text = text.removeprefix(BYTE_ORDER_MARK)
            if text:
                yield text

    def _data(self) -> Iterator[bytes]:
        """The file's bytes, unpacked; an empty piece ends them."""
        with self._file:
            stream = gzip.GzipFile(fileobj=self._file) if self._is_packed else self._file
            told = 0
            while True:
                try:
                    data = stream.read(CHUNK_BYTES)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise InputError(f"{self.path}: the gzip file is damaged ({error}); pack it anew") from None
                except OSError as error:
                    raise InputError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
                position = self._file.tell()
                self._on_bytes(position - told)
                told = position
                yield data
                if not data:
                    return

    def lines(self) -> Iterator[str]:
        """The lines, ended by LF, without it; a CR before it stays.

        Raises:
            InputError: As `chunks`.
        """
        rest: list[str] = []
        for chunk in self.chunks():
            first, *others = chunk.split("\n")
            rest.append(first)
            if others:
                yield "".join(rest)
                yield from others[:-1]
                rest = [others[-1]]
        last = "".join(rest)
        if last:
            yield last
