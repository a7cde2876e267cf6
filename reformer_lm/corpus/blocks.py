"""Blocks: the unit in which a corpus is tokenised, written down at once and found again after a kill.

A block is about a million characters of articles. What became of it is a pair of files

    block-000000.bin    its articles' lengths, hashes and tokens
    block-000000.json   counts, the place in the corpus behind it, and the checksum of the other file

each written under another name and renamed, the second after the first: a block whose pair is not whole does not
count and is tokenised again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus.sources import CorpusSource, Place
from reformer_lm.errors import InputError
from reformer_lm.text import ArticleEncoder, EncodedArticles, bare_ids

# Characters of a block: enough to be worth a process's while, little enough to hold in memory.
BLOCK_CHARACTERS = 1 << 20
HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class BlockOfArticles:
    """What is to be tokenised.

    Attributes:
        articles: Texts, or token ids as int64 [tokens].
        num_dropped: Articles that were left out, being too short or blank.
        end: The place in the corpus behind all of them.
    """

    articles: list[str | np.ndarray]
    num_dropped: int
    end: Place


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a tokenised block without opening it.

    Attributes:
        num_articles: Articles in it.
        num_tokens: Tokens in it, beginnings and ends included.
        num_dropped: Articles that were left out.
        end: The place in the corpus behind it.
        unknown: Unknown characters with their counts, of training and validation articles.
        sha256: Checksum of its data.
    """

    num_articles: int
    num_tokens: int
    num_dropped: int
    end: Place
    unknown: tuple[dict[str, int], dict[str, int]]
    sha256: str


@dataclass(frozen=True)
class BlockData:
    """The articles of a tokenised block: int64 and uint64 [articles], tokens [all tokens]."""

    lengths: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every id."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


def goes_to_validation(hashes: np.ndarray, val_split: float) -> np.ndarray:
    """Which articles a split sends to validation: bool [articles], decided by their hashes alone."""
    return hashes < np.uint64(min(int(val_split * HASH_RANGE), HASH_RANGE - 1))


def cut_into_blocks(
    source: CorpusSource, start: Place, tokenizer: PreTrainedTokenizerFast, min_length: int, on_bytes: Any
) -> Iterator[BlockOfArticles]:
    """Divide a corpus, from a place on, into blocks.

    Args:
        source: The corpus.
        start: Where to begin: nowhere, or the end of an earlier block.
        tokenizer: Token ids are checked against its vocabulary.
        min_length: Articles of so many characters (ids, where there are only those) or fewer are dropped.
        on_bytes: Told how many bytes were read.

    Raises:
        InputError: If an article cannot be read, or has an id that the vocabulary lacks.
    """
    articles: list[str | np.ndarray] = []
    characters = dropped = 0
    end = start
    for end, article in source.articles(start, on_bytes):
        characters += len(article)
        if isinstance(article, str):
            is_kept = len(article) > min_length and bool(article.strip())
        else:
            _require_known_ids(article, len(tokenizer), source.files[end.file], end.article)
            length = len(bare_ids(article, tokenizer.bos_token_id, tokenizer.eos_token_id))
            is_kept = length > min_length
        if is_kept:
            articles.append(article)
        else:
            dropped += 1
        if characters >= BLOCK_CHARACTERS:
            yield BlockOfArticles(articles, dropped, end)
            articles, characters, dropped = [], 0, 0
    if articles or dropped:
        yield BlockOfArticles(articles, dropped, end)


def _require_known_ids(ids: np.ndarray, size: int, path: Path, number: int) -> None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise InputError(
            f"{path}: article {number} has the token id {wrong[0]}, but the vocabulary has {size:,} tokens; "
            "give the tokenizer that the file was encoded with (--tokenizer_path)"
        )


class BlockFolder:
    """A folder of tokenised blocks.

    Args:
        path: An existing folder.
        dtype: Of the tokens.
        val_split: The share of articles that goes to validation.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], val_split: float) -> None:
        self.path = path
        self.dtype = dtype
        self.val_split = val_split

    def write(self, number: int, block: BlockOfArticles, encoder: ArticleEncoder) -> BlockRecord:
        """Tokenise a block."""
        encoded = _encode(block.articles, encoder)
        tokens = encoded.tokens.astype(self.dtype)
        data = b"".join(
            [encoded.lengths.astype("<i8").tobytes(), encoded.hashes.astype("<u8").tobytes(), tokens.tobytes()]
        )
        record = BlockRecord(
            num_articles=len(encoded.lengths),
            num_tokens=len(tokens),
            num_dropped=block.num_dropped,
            end=block.end,
            unknown=self._unknown(encoded),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        self._write(self._data_path(number), data)
        self._write(self._record_path(number), json.dumps(dataclasses.asdict(record)).encode())
        return record

    def _unknown(self, encoded: EncodedArticles) -> tuple[dict[str, int], dict[str, int]]:
        is_validation = goes_to_validation(encoded.hashes, self.val_split)[encoded.unknown_articles]
        training, validation = (
            dict(Counter(map(chr, encoded.unknown_characters[chosen].tolist())))
            for chosen in (~is_validation, is_validation)
        )
        return training, validation

    def _write(self, path: Path, data: bytes) -> None:
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_bytes(data)
        partial.replace(path)

    def read_records(self) -> dict[int, BlockRecord]:
        """All blocks whose files are whole, by number."""
        records = {}
        for path in sorted(self.path.glob("block-*.json")):
            number = int(path.stem.removeprefix("block-"))
            try:
                fields = json.loads(path.read_bytes())
                training, validation = fields.pop("unknown")
                record = BlockRecord(**{**fields, "end": Place(**fields["end"]), "unknown": (training, validation)})
                with self._data_path(number).open("rb") as file:
                    is_whole = hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if is_whole:
                records[number] = record
        return records

    def read(self, number: int, record: BlockRecord) -> BlockData:
        """Open a block; its tokens stay on disk."""
        articles = record.num_articles
        path = self._data_path(number)
        head = np.fromfile(path, dtype="<i8", count=2 * articles)
        tokens = np.memmap(path, self.dtype, "r", 16 * articles) if record.num_tokens else np.empty(0, self.dtype)
        return BlockData(head[:articles], head[articles:].view("<u8"), tokens)

    def _data_path(self, number: int) -> Path:
        return self.path / f"block-{number:06d}.bin"

    def _record_path(self, number: int) -> Path:
        return self.path / f"block-{number:06d}.json"


def _encode(articles: list[str | np.ndarray], encoder: ArticleEncoder) -> EncodedArticles:
    """Encode texts and token ids, which stand in runs: those of one file after those of another."""
    parts: list[EncodedArticles] = []
    first = 0
    for number in range(1, len(articles) + 1):
        is_text = isinstance(articles[first], str)
        if number < len(articles) and isinstance(articles[number], str) == is_text:
            continue
        run = articles[first:number]
        texts, ids = [a for a in run if isinstance(a, str)], [a for a in run if not isinstance(a, str)]
        encoded = encoder.encode(texts) if is_text else encoder.encode_ids(ids)
        parts.append(dataclasses.replace(encoded, unknown_articles=encoded.unknown_articles + first))
        first = number
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return encoder.encode([])
    names = [field.name for field in dataclasses.fields(EncodedArticles)]
    return EncodedArticles(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
