"""Token shards: a corpus, tokenised once, as memory-mapped files.

A folder of shards holds

    index.json             what the shards are: counts, checksums, tokenizer, sources, settings (`ShardIndex`)
    tokens-00000.bin ...   token ids, little-endian uint16 (vocabularies up to 65,536) or uint32, nothing else
    articles-00000.bin ... where each article of that shard starts, little-endian int64, from its first token
    hashes-00000.bin ...   a hash of each article's text, little-endian uint64 (`EncodedArticles`)

and always appears whole: it is written under another name and renamed. Its bytes depend on the sources, the tokenizer
and the settings alone, not on the number of processes or on interruptions.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus.blocks import (
    BLOCK_CHARACTERS,
    BlockData,
    BlockFolder,
    BlockRecord,
    goes_to_validation,
    token_dtype,
)
from reformer_lm.corpus.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    REMEDY,
    Shard,
    ShardIndex,
    read_index,
    write_index,
)
from reformer_lm.corpus.sources import CorpusSource
from reformer_lm.corpus.stream import TokenStream
from reformer_lm.corpus.tokenising import tokenise, work_folder
from reformer_lm.errors import InputError
from reformer_lm.text import tokenizer_fingerprint

# Unknown characters that an index names.
MOST_FREQUENT = 10


def build_shards(
    source: CorpusSource,
    tokenizer: PreTrainedTokenizerFast,
    directory: str | Path,
    num_pieces: int,
    min_length: int = 0,
    *,
    val_split: float = 0.0,
    validation_directory: str | Path | None = None,
    workers: int = 1,
    show_progress: bool = False,
    on_resume: Callable[[int], object] | None = None,
) -> ShardIndex:
    """Tokenise a corpus into a folder of shards, replacing what an earlier call left there.

    Each article becomes its beginning-of-text token, its tokens and its end-of-text token. Memory does not grow with
    the corpus. A call that was interrupted, even killed, leaves its work in ``<directory>.partial``; the same call
    continues it.

    Args:
        source: The articles.
        tokenizer: With bos, eos and unk tokens.
        directory: Where the shards go. It may exist only if it is empty or holds shards.
        num_pieces: Number of shards; fewer if there are fewer articles.
        min_length: Articles of this many characters or fewer are dropped (GPT2-Chinese's meaning), blank ones always.
        val_split: The share of articles, from 0 to below 1, that goes to validation instead: those whose hashes are
            lowest, whatever their order and files. Articles of the same text go the same way.
        validation_directory: Where those go, as one shard; needed for a split.
        workers: Processes that tokenise.
        show_progress: Draw a bar on stderr.
        on_resume: Told how many articles an interrupted call had tokenised, if it had.

    Returns:
        The index that was written to ``directory``.

    Raises:
        InputError: If no article is long enough, a part of the split is empty, or a folder cannot be written, holds
            other things or is being worked in.
    """
    directory = Path(directory)
    if num_pieces < 1:
        raise InputError(f"num_pieces is {num_pieces}; the tokens need at least 1 shard")
    places = [directory] if validation_directory is None else [directory, Path(validation_directory)]
    for place in places:
        _refuse_foreign_folder(place)
    # Resolved, because "." has no name to append to.
    places = [place.resolve() for place in places]
    partial = places[0].with_name(places[0].name + ".partial")
    try:
        with work_folder(partial, _key(source, tokenizer, min_length, val_split)) as work:
            folder = BlockFolder(work, token_dtype(tokenizer), val_split)
            records = tokenise(source, tokenizer, folder, min_length, workers, show_progress, on_resume)
            parts = [_Part(folder, records, None if validation_directory is None else False)]
            if validation_directory is not None:
                parts.append(_Part(folder, records, True))
            _require_articles(source, parts, min_length, val_split)
            # The training shards last: once they are there, everything is.
            for part, place in reversed(list(zip(parts, places, strict=True))):
                ready = work / ("validation" if part.is_validation else "training")
                shutil.rmtree(ready, ignore_errors=True)
                ready.mkdir()
                shards = tuple(_write_shards(part, ready, 1 if part.is_validation else num_pieces))
                index = _describe(part, source, tokenizer, min_length, val_split, shards)
                write_index(index, ready)
                _replace(place, ready)
    except OSError as error:
        raise InputError(
            f"{directory}: the token shards cannot be written ({error.strerror}); "
            "free the space or give another folder with --tokenized_data_path"
        ) from None
    return index


def _key(source: CorpusSource, tokenizer: PreTrainedTokenizerFast, min_length: int, val_split: float) -> str:
    """A checksum of all that the blocks depend on."""
    parts = [
        str(FORMAT_VERSION),
        str(BLOCK_CHARACTERS),
        tokenizer_fingerprint(tokenizer),
        str(min_length),
        str(val_split),
        repr(source.reading),
        *(f"{file.suffix} {described.sha256}" for file, described in zip(source.files, source.sources, strict=True)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _refuse_foreign_folder(directory: Path) -> None:
    """Never delete what this module did not write."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: this is a file; give a folder for the token shards (--tokenized_data_path)")
    names = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    ours = ("tokens-", "articles-", "hashes-")
    foreign = sorted(name for name in names if name != INDEX_NAME and not name.startswith(ours))
    if foreign:
        raise InputError(
            f"{directory}: holds {foreign[0]!r}, which is no token shard; "
            "give a folder of its own (--tokenized_data_path)"
        )


def _replace(directory: Path, ready: Path) -> None:
    """Put a finished folder in the place of an earlier one; at no time is a part of one there."""
    old = ready.with_name(ready.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        directory.rename(old)
    ready.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class _Part:
    """The articles of a folder of blocks that are for one folder of shards.

    Attributes:
        folder: The blocks.
        records: What is known of each.
        is_validation: Which side of the split; None for all articles.
    """

    folder: BlockFolder
    records: Sequence[BlockRecord]
    is_validation: bool | None

    def blocks(self) -> Iterator[BlockData]:
        """The part's articles, block by block."""
        return (self.block(number) for number in range(len(self.records)))

    def block(self, number: int) -> BlockData:
        """The part's articles in one block."""
        data = self.folder.read(number, self.records[number])
        if self.is_validation is None:
            return data
        chosen = goes_to_validation(data.hashes, self.folder.val_split) == self.is_validation
        return BlockData(data.lengths[chosen], data.hashes[chosen], data.tokens[np.repeat(chosen, data.lengths)])

    @cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Articles and tokens of each block: int64 [blocks] each."""
        if self.is_validation is None:
            counts = [(record.num_articles, record.num_tokens) for record in self.records]
        else:
            counts = [(len(block.lengths), int(block.lengths.sum())) for block in self.blocks()]
        articles, tokens = np.array(counts, dtype=np.int64).reshape(-1, 2).T
        return articles, tokens


def _require_articles(source: CorpusSource, parts: Sequence[_Part], min_length: int, val_split: float) -> None:
    counts = [int(part.sizes[0].sum()) for part in parts]
    dropped = sum(record.num_dropped for record in parts[0].records)
    if not sum(counts) and not (dropped and min_length):
        raise InputError(f"{source.name}: no article with any text in it; the corpus is empty")
    if not sum(counts):
        raise InputError(
            f"{source.name}: none of the {dropped} articles has more than {min_length} characters; "
            "lower --min_length or give a longer corpus"
        )
    for count, name in zip(counts, ("training", "validation"), strict=False):
        if not count:
            raise InputError(
                f"--val_split {val_split} leaves none of the {sum(counts):,} articles to {name}; "
                "give another share, or validation text of its own with --val_data_path"
            )


def _describe(
    part: _Part,
    source: CorpusSource,
    tokenizer: PreTrainedTokenizerFast,
    min_length: int,
    val_split: float,
    shards: tuple[Shard, ...],
) -> ShardIndex:
    unknown: Counter[str] = Counter()
    for record in part.records:
        # Without a split all articles count as training.
        unknown.update(record.unknown[1 if part.is_validation else 0])
    return ShardIndex(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=part.folder.dtype.str,
        min_length=min_length,
        val_split=val_split,
        is_validation=bool(part.is_validation),
        reading=source.reading,
        num_dropped=sum(record.num_dropped for record in part.records),
        num_unknown=sum(int((block.tokens == tokenizer.unk_token_id).sum()) for block in part.blocks()),
        unknown_characters=tuple(sorted(unknown.items(), key=lambda item: (-item[1], item[0]))[:MOST_FREQUENT]),
        sources=source.sources,
        shards=shards,
    )


def _boundaries(part: _Part, num_pieces: int) -> list[int]:
    """Cut between articles so that the shards' token counts are about equal and none is empty."""
    articles, tokens = part.sizes
    article_stops, token_stops = np.cumsum(articles), np.cumsum(tokens)
    count, total = int(article_stops[-1]), int(token_stops[-1])
    num_pieces = min(num_pieces, count)
    boundaries = [0]
    for piece in range(1, num_pieces):
        target = total * piece / num_pieces
        block = int(np.searchsorted(token_stops, target, side="right"))
        ends = np.cumsum(part.block(block).lengths) + token_stops[block] - tokens[block]
        wanted = int(np.searchsorted(ends, target, side="right") + article_stops[block] - articles[block])
        boundaries.append(min(max(wanted, boundaries[-1] + 1), count - (num_pieces - piece)))
    return [*boundaries, count]


def _write_shards(part: _Part, directory: Path, num_pieces: int) -> Iterator[Shard]:
    boundaries = _boundaries(part, num_pieces)
    shard = _ShardFiles(directory, 0)
    article = 0
    for block in part.blocks():
        starts = np.concatenate([[0], np.cumsum(block.lengths)])
        first = 0
        while first < len(block.lengths):
            if article == boundaries[shard.number + 1]:
                yield shard.finish()
                shard = _ShardFiles(directory, shard.number + 1)
            last = min(len(block.lengths), first + boundaries[shard.number + 1] - article)
            tokens = block.tokens[starts[first] : starts[last]]
            shard.add(block.lengths[first:last], block.hashes[first:last], tokens)
            article += last - first
            first = last
    yield shard.finish()


class _ShardFiles:
    """The three files of a shard while they are written."""

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        self._name = f"{number:05d}"
        self._files = {
            kind: (directory / f"{kind}-{self._name}.bin").open("wb") for kind in ("tokens", "articles", "hashes")
        }
        self._digests = {kind: hashlib.sha256() for kind in self._files}
        self._num_tokens = self._num_articles = 0

    def add(self, lengths: np.ndarray, hashes: np.ndarray, tokens: np.ndarray) -> None:
        """Append some articles."""
        starts = np.cumsum(lengths) - lengths + self._num_tokens
        self._num_articles += len(lengths)
        self._num_tokens += len(tokens)
        pieces = {"tokens": tokens, "articles": starts.astype("<i8"), "hashes": hashes.astype("<u8")}
        for kind, piece in pieces.items():
            data = piece.tobytes()
            self._digests[kind].update(data)
            self._files[kind].write(data)

    def finish(self) -> Shard:
        """Close the files."""
        for file in self._files.values():
            file.close()
        digests = {f"{kind}_sha256": digest.hexdigest() for kind, digest in self._digests.items()}
        return Shard(self._name, self._num_tokens, self._num_articles, **digests)


def load_shards(directory: str | Path, fingerprint: str, *, verify: bool = True) -> TokenStream:
    """Open a folder of shards as one stream, memory-mapped.

    Args:
        directory: Written by `build_shards`.
        fingerprint: Of the tokenizer in use; the shards' must be the same.
        verify: Also compare the checksums, which reads every byte once (about a second per gigabyte).

    Raises:
        InputError: If the index is missing, a shard is missing, truncated or corrupt (named), or another
            tokenizer wrote them.
    """
    directory = Path(directory)
    index = read_index(directory)
    if index.tokenizer_fingerprint != fingerprint:
        raise InputError(f"{directory}: these shards were written with another tokenizer; {REMEDY}")
    parts, article_starts = [], []
    for shard in index.shards:
        tokens_path = directory / f"tokens-{shard.name}.bin"
        articles_path = directory / f"articles-{shard.name}.bin"
        parts.append(_map(tokens_path, np.dtype(index.dtype), shard.num_tokens, shard.tokens_sha256, verify))
        article_starts.append(_map(articles_path, np.dtype("<i8"), shard.num_articles, shard.articles_sha256, verify))
    load_hashes(directory, index, verify=verify)
    return TokenStream(parts, article_starts)


def load_hashes(directory: Path, index: ShardIndex, *, verify: bool = False) -> list[np.ndarray]:
    """Open the articles' hashes, memory-mapped: uint64 [articles] for each shard.

    Raises:
        InputError: If a file is missing, truncated or, where they are verified, corrupt.
    """
    return [
        _map(directory / f"hashes-{shard.name}.bin", np.dtype("<u8"), shard.num_articles, shard.hashes_sha256, verify)
        for shard in index.shards
    ]


def _map(path: Path, dtype: np.dtype[Any], count: int, sha256: str, verify: bool) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise InputError(
                f"{path}: the shard has {size:,} bytes instead of {count * dtype.itemsize:,} "
                f"({'truncated' if size < count * dtype.itemsize else 'too long'}); {REMEDY}"
            )
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise InputError(f"{path}: the shard is corrupt (its checksum is another); {REMEDY}")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    except FileNotFoundError:
        raise InputError(f"{path}: this shard is missing; {REMEDY}") from None
    except OSError as error:
        raise InputError(f"{path}: the shard cannot be read ({error.strerror}); {REMEDY}") from None
