"""Read corpora that others have encoded: token ids in .npz archives and in GPT2-Chinese's text files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from reformer_lm.corpus.files import OnBytes, TextFile, ignore_bytes, open_file
from reformer_lm.errors import InputError

# GPT2-Chinese's name of piece i of a tokenised corpus.
TOKENIZED_NAME = "tokenized_train_{}.txt"


def find_tokenized_files(directory: Path) -> list[Path]:
    """GPT2-Chinese's ``tokenized_train_0.txt`` and so on in a folder, in the order of their numbers.

    Raises:
        InputError: If one is missing between others.
    """
    known = {path.name for path in directory.glob(TOKENIZED_NAME.format("*"))} if directory.is_dir() else set()
    names = [TOKENIZED_NAME.format(number) for number in range(len(known))]
    for name in names:
        if name not in known:
            others = ", ".join(sorted(known)[:3])
            raise InputError(f"{directory / name}: missing beside {others}; bring it back, or tokenise with --raw")
    return [directory / name for name in names]


def read_token_text(file: TextFile, begin_id: int) -> Iterator[np.ndarray]:
    """Iterate over the articles of a file of token ids in decimal, separated by white space.

    Args:
        file: The file.
        begin_id: The token that begins an article. What stands before the first is an article, too.

    Yields:
        int64 [tokens], the beginning included.

    Raises:
        InputError: If something is no number.
    """
    return _cut_into_articles(_numbers(file), begin_id)


def _numbers(file: TextFile) -> Iterator[np.ndarray]:
    rest = ""
    count = 0
    for chunk in file.chunks():
        words = (rest + chunk).split()
        # The last word may go on in the next chunk.
        rest = words.pop() if words and not chunk[-1].isspace() else ""
        if words:
            yield _converted(file.path, words, count)
            count += len(words)
    if rest:
        yield _converted(file.path, [rest], count)


def _converted(path: Path, words: list[str], before: int) -> np.ndarray:
    try:
        return np.array(words).astype(np.int64)
    except (ValueError, OverflowError):
        number, word = next((n, w) for n, w in enumerate(words, start=before + 1) if not _is_number(w))
        raise InputError(f"{path}: word {number} is {word[:20]!r}, not a token id; give a file of ids") from None


def _is_number(word: str) -> bool:
    try:
        return abs(int(word)) < 1 << 62
    except ValueError:
        return False


def _cut_into_articles(pieces: Iterable[np.ndarray], begin_id: int) -> Iterator[np.ndarray]:
    """Join pieces of a stream, and cut it before each beginning."""
    open_article: list[np.ndarray] = []
    for piece in pieces:
        starts = np.flatnonzero(piece == begin_id)
        head, *articles = np.split(piece, starts)
        if len(head):
            open_article.append(head)
        for article in articles:
            if open_article:
                yield np.concatenate(open_article)
            open_article = [article]
    if open_article:
        yield np.concatenate(open_article)


def read_npz(path: Path, begin_id: int, on_bytes: OnBytes = ignore_bytes) -> Iterator[np.ndarray]:
    """Iterate over the articles of an archive of token arrays, as nshepperd/gpt-2's encode.py writes it.

    Each array is an article, or several if it has beginnings inside; nothing of the file's text is known.

    Args:
        path: The file.
        begin_id: The token that begins an article.
        on_bytes: Told of the packed bytes of the arrays.

    Yields:
        int64 [tokens], one array at a time.

    Raises:
        InputError: If the file is missing (at once), damaged, or holds other things than rows of whole numbers.
    """
    open_file(path).close()
    return _read_arrays(path, begin_id, on_bytes)


def _read_arrays(path: Path, begin_id: int, on_bytes: OnBytes) -> Iterator[np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    ids = _read_array(path, member.filename, file)
                on_bytes(member.compress_size)
                yield from _cut_into_articles([ids], begin_id)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: no .npz archive that can be read ({error}); write it anew") from None


def _read_array(path: Path, name: str, file: IO[bytes]) -> np.ndarray:
    # Pickled objects, which could run code, are refused.
    ids = np.lib.format.read_array(file, allow_pickle=False)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path}: array {name.removesuffix('.npy')!r} has shape {list(ids.shape)} of {ids.dtype}; "
            "each array must be one row of token ids (np.savez_compressed(file, *arrays))"
        )
    if ids.dtype == np.uint64 and len(ids) and ids.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: array {name.removesuffix('.npy')!r} holds {ids.max()}, which is no token id")
    return ids.astype(np.int64)
