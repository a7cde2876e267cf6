"""What a folder of token shards says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus.readers import DEFAULT_READING, Reading
from reformer_lm.corpus.sources import SourceFile
from reformer_lm.errors import InputError
from reformer_lm.text import UnknownCounter

INDEX_NAME = "index.json"
FORMAT_VERSION = 2
REMEDY = "run again with --raw to tokenise the corpus anew"


@dataclass(frozen=True)
class Shard:
    """Three files that belong together.

    Attributes:
        name: Five digits; the files are ``tokens-<name>.bin``, ``articles-<name>.bin`` and ``hashes-<name>.bin``.
        num_tokens: Tokens in it.
        num_articles: Articles in it.
        tokens_sha256: Checksum of the tokens file.
        articles_sha256: Checksum of the articles file.
        hashes_sha256: Checksum of the hashes file.
    """

    name: str
    num_tokens: int
    num_articles: int
    tokens_sha256: str
    articles_sha256: str
    hashes_sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards contains.

    Attributes:
        tokenizer_fingerprint: Of the tokenizer that wrote the ids.
        dtype: numpy's name of the integer type, ``<u2`` or ``<u4``.
        min_length: Only articles of more characters than this were taken.
        val_split: The share of articles, from 0 to 1, that their hashes sent to validation.
        is_validation: Whether these are the articles of that share, and not the others.
        reading: How the files were read.
        num_dropped: Articles that were too short.
        num_unknown: Tokens that are the tokenizer's unknown token.
        unknown_characters: The most frequent characters behind those, with their counts.
        sources: The files the articles came from.
        shards: The files, in order.
        version: Of this format.
    """

    tokenizer_fingerprint: str
    dtype: str
    min_length: int
    val_split: float
    is_validation: bool
    reading: Reading
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
        # Only what is not as ever, so that runs which began before there was a choice can go on.
        if self.val_split:
            parts.append(f"{'validation' if self.is_validation else 'training'} of a split at {self.val_split}")
        if self.reading != DEFAULT_READING:
            parts.append(repr(self.reading))
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


def write_index(index: ShardIndex, directory: Path) -> None:
    """Write the index of a folder of shards."""
    text = json.dumps(dataclasses.asdict(index), indent=1)
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")


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
        fields["reading"] = Reading(**fields["reading"])
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
