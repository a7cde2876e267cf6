"""Find validation articles that training has seen: what they say of a model is too good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reformer_lm.corpus.index import read_index
from reformer_lm.corpus.shards import load_hashes

# Hashes of training articles compared at a time.
COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Leaks:
    """Validation articles that also stand in the training text.

    Attributes:
        articles: Their numbers in the validation stream, rising.
        num_articles: Validation articles in all.
    """

    articles: tuple[int, ...]
    num_articles: int


def find_leaks(training: str | Path, validation: str | Path) -> Leaks:
    """Compare two folders of shards by the hashes of their articles.

    The hashes are of texts as the tokenizer normalizes them, without white space, so that another line length, width of
    space or (unless case is kept) case hides nothing. Memory: the validation articles' hashes, 8 bytes each.

    Args:
        training: Folder of shards.
        validation: Folder of shards.

    Raises:
        InputError: If a folder holds no shards, or its hashes are damaged.
    """
    hashes = load_hashes(Path(validation), read_index(validation))
    wanted = np.concatenate([np.empty(0, np.uint64), *hashes])
    different = np.unique(wanted)
    is_seen = np.zeros(len(different), dtype=bool)
    for shard in load_hashes(Path(training), read_index(training)):
        for first in range(0, len(shard), COMPARED_AT_ONCE):
            some = np.asarray(shard[first : first + COMPARED_AT_ONCE])
            places = np.minimum(np.searchsorted(different, some), len(different) - 1)
            is_seen[places[different[places] == some]] = True
    leaked = np.flatnonzero(is_seen[np.searchsorted(different, wanted)])
    return Leaks(tuple(leaked.tolist()), len(wanted))
