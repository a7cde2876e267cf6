"""Token shards: a corpus, tokenised once, as memory-mapped files.

A folder of shards holds

    index.json             what the shards are: counts, checksums, tokenizer, sources, settings (`ShardIndex`)
    tokens-00000.bin ...   token ids, little-endian uint16 (vocabularies up to 65,536) or uint32, nothing else
    articles-00000.bin ... where each article of that shard starts, little-endian int64, from its first token

and always appears whole: it is written under another name and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus.readers import SourceFile
from reformer_lm.corpus.stream import TokenStream
from reformer_lm.errors import InputError
from reformer_lm.text import UnknownCounter, encode_articles, tokenizer_fingerprint

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
REMEDY = "run again with --raw to tokenise the corpus anew"

# Characters handed to the tokenizer at a time: enough to keep its threads busy, little enough to hold in
# memory.
BATCH_CHARACTERS = 1 << 20
COPY_TOKENS = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One pair of files.

    Attributes:
        name: Five digits; the files are ``tokens-<name>.bin`` and ``articles-<name>.bin``.
        num_tokens: Tokens in it.
        num_articles: Articles in it.
        tokens_sha256: Checksum of the tokens file.
        articles_sha256: Checksum of the articles file.
    """

    name: str
    num_tokens: int
    num_articles: int
    tokens_sha256: str
    articles_sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards contains.

    Attributes:
        tokenizer_fingerprint: Of the tokenizer that wrote the ids.
        dtype: numpy's name of the integer type, ``<u2`` or ``<u4``.
        min_length: Only articles of more characters than this were taken.
        num_dropped: Articles that were not.
        num_unknown: Tokens that are the tokenizer's unknown token.
        unknown_characters: The most frequent characters behind those, with their counts.
        sources: The files the articles came from.
        shards: The files, in order.
        version: Of this format.
    """

    tokenizer_fingerprint: str
    dtype: str
    min_length: int
    num_dropped: int
    num_unknown: int
    unknown_characters: tuple[tuple[str, int], ...]
    sources: tuple[SourceFile, ...]
    shards: tuple[Shard, ...]
    version: int = FORMAT_VERSION

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards, the start and end of each article included."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_articles(self) -> int:
        """Articles in all shards."""
        return sum(shard.num_articles for shard in self.shards)

    @property
    def identity(self) -> str:
        """A checksum of all that decides the stream's content, however many shards it is kept in."""
        parts = [
            self.tokenizer_fingerprint,
            str(self.min_length),
            *(source.sha256 for source in self.sources),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def unknown_share(self) -> float:
        """The part of all tokens, from 0 to 1, that is the unknown token."""
        return self.num_unknown / self.num_tokens

    def unknown_message(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """A line that names the most frequent unknown characters, "" if few tokens are unknown."""
        counter = UnknownCounter(tokenizer)
        counter.tokens, counter.unknown = self.num_tokens, self.num_unknown
        counter.characters.update(dict(self.unknown_characters))
        return counter.message()


def build_shards(
    articles: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    directory: str | Path,
    num_pieces: int,
    min_length: int = 0,
    *,
    sources: Sequence[SourceFile] = (),
    show_progress: bool = False,
) -> ShardIndex:
    """Tokenise a corpus into a folder of shards, replacing what an earlier call left there.

    Each article becomes its beginning-of-text token, its tokens and its end-of-text token. Memory does not
    grow with the corpus: the tokens go to one file as they come, which is then cut between articles into
    shards of about equal size.

    Args:
        articles: The texts.
        tokenizer: With bos, eos and unk tokens.
        directory: Where the shards go. It may exist only if it is empty or holds shards.
        num_pieces: Number of shards; fewer if there are fewer articles.
        min_length: Articles of this many characters or fewer are dropped (GPT2-Chinese's meaning), blank ones
            always.
        sources: What the articles were read from, to be noted in the index.
        show_progress: Draw a bar on stderr.

    Returns:
        The index that was written.

    Raises:
        InputError: If no article is long enough, or the folder cannot be written or holds other things.
    """
    directory = Path(directory)
    if num_pieces < 1:
        raise InputError(f"num_pieces is {num_pieces}; the tokens need at least 1 shard")
    _refuse_foreign_folder(directory)
    # Resolved, because "." has no name to append to.
    partial = directory.resolve().with_name(directory.resolve().name + ".partial")
    try:
        # Left behind by a run that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
            written = _write_tokens(articles, tokenizer, partial / "all.bin", dtype, min_length, show_progress)
            if not len(written.article_lengths):
                raise InputError(
                    f"none of the {written.num_dropped} articles has more than {min_length} characters; "
                    "lower --min_length or give a longer corpus"
                )
            index = ShardIndex(
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                dtype=dtype.str,
                min_length=min_length,
                num_dropped=written.num_dropped,
                num_unknown=written.unknown.unknown,
                unknown_characters=tuple(written.unknown.most_frequent()),
                sources=tuple(sources),
                shards=tuple(_cut_into_shards(partial / "all.bin", dtype, written.article_lengths, num_pieces)),
            )
            (partial / "all.bin").unlink()
            (partial / INDEX_NAME).write_text(json.dumps(dataclasses.asdict(index), indent=1), encoding="utf-8")
            if directory.exists():
                shutil.rmtree(directory)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{directory}: the token shards cannot be written ({error.strerror}); "
            "free the space or give another folder with --tokenized_data_path"
        ) from None
    return index


@dataclass(frozen=True)
class _Written:
    article_lengths: np.ndarray
    num_dropped: int
    unknown: UnknownCounter


def _refuse_foreign_folder(directory: Path) -> None:
    """Never delete what this module did not write."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: this is a file; give a folder for the token shards (--tokenized_data_path)")
    names = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    foreign = sorted(name for name in names if name != INDEX_NAME and not name.startswith(("tokens-", "articles-")))
    if foreign:
        raise InputError(
            f"{directory}: holds {foreign[0]!r}, which is no token shard; "
            "give a folder of its own (--tokenized_data_path)"
        )


def _batches(articles: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for article in articles:
        batch.append(article)
        characters += len(article)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_tokens(
    articles: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    dtype: np.dtype[Any],
    min_length: int,
    show_progress: bool,
) -> _Written:
    """Write all tokens to one file; remember how long each article is."""
    lengths: list[int] = []
    num_dropped = 0
    unknown = UnknownCounter(tokenizer)
    with path.open("wb") as file, tqdm(disable=not show_progress, unit=" articles", desc="tokenising") as bar:
        for batch in _batches(articles):
            kept = [article for article in batch if len(article) > min_length and article.strip()]
            num_dropped += len(batch) - len(kept)
            for article, ids in zip(kept, encode_articles(tokenizer, kept), strict=True):
                unknown.add(article, ids)
                lengths.append(len(ids))
                file.write(np.asarray(ids, dtype=dtype).tobytes())
            bar.update(len(batch))
    return _Written(np.asarray(lengths, dtype=np.int64), num_dropped, unknown)


def _shard_boundaries(article_lengths: np.ndarray, num_pieces: int) -> list[int]:
    """Cut between articles so that the shards' token counts are about equal and none is empty."""
    count = len(article_lengths)
    num_pieces = min(num_pieces, count)
    ends = np.cumsum(article_lengths)
    boundaries = [0]
    for piece in range(1, num_pieces):
        wanted = int(np.searchsorted(ends, ends[-1] * piece / num_pieces, side="right"))
        boundaries.append(min(max(wanted, boundaries[-1] + 1), count - (num_pieces - piece)))
    return [*boundaries, count]


def _cut_into_shards(path: Path, dtype: np.dtype[Any], article_lengths: np.ndarray, num_pieces: int) -> Iterator[Shard]:
    boundaries = _shard_boundaries(article_lengths, num_pieces)
    with path.open("rb") as source:
        for number, (first, last) in enumerate(pairwise(boundaries)):
            name = f"{number:05d}"
            lengths = article_lengths[first:last]
            starts = (np.cumsum(lengths) - lengths).astype("<i8").tobytes()
            (path.parent / f"articles-{name}.bin").write_bytes(starts)
            num_tokens = remaining = int(lengths.sum())
            digest = hashlib.sha256()
            with (path.parent / f"tokens-{name}.bin").open("wb") as target:
                while remaining:
                    count = min(remaining, COPY_TOKENS)
                    data = source.read(count * dtype.itemsize)
                    digest.update(data)
                    target.write(data)
                    remaining -= count
            yield Shard(name, num_tokens, last - first, digest.hexdigest(), hashlib.sha256(starts).hexdigest())


def read_index(directory: str | Path) -> ShardIndex:
    """Read what a folder of shards says of itself, without opening the shards.

    Raises:
        InputError: If there is no index, or it is damaged or of another version.
    """
    path = Path(directory) / INDEX_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != FORMAT_VERSION:
            raise InputError(f"{path}: written by another version of this program; {REMEDY}")
        fields["sources"] = tuple(SourceFile(**source) for source in fields["sources"])
        fields["unknown_characters"] = tuple((str(name), int(count)) for name, count in fields["unknown_characters"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        return ShardIndex(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory}: no token shards here ({INDEX_NAME} is missing); {REMEDY}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: the index is damaged; {REMEDY}") from None


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
    return TokenStream(parts, article_starts)


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
