"""Scoring by several processes: each takes every n-th block of texts, the first gives out all results in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import distributed

from reformer_lm.scoring.scores import Score
from reformer_lm.scoring.stream import Block, blocks_of, score_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from reformer_lm.scoring.stream import ScoringOptions


def score_distributed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    options: ScoringOptions,
    prefixes: Iterable[str] | None = None,
) -> Iterator[Score]:
    """Score texts by all processes of the default process group, or by this one where there is none.

    Every process must call this with the same texts and run the iterator to its end. A text's score is the one that a
    single process gives: it does not depend on what is scored beside it. Results travel as pickled objects, for
    which the group needs gloo.

    Args:
        model: As in ``score``; a whole copy in each process.
        tokenizer: As in ``score``.
        texts: The same in each process, read by each of them.
        options: From `check_options`.
        prefixes: As in ``score``.

    Yields:
        In process 0 all scores, in the order of the texts; in the others nothing.

    Raises:
        Exception: In every process what went wrong in the first that failed.
    """
    blocks = blocks_of(texts, prefixes)
    if not (distributed.is_available() and distributed.is_initialized()):
        for block in blocks:
            yield from score_block(model, tokenizer, block, options)
        return
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    while turn := list(islice(blocks, processes)):
        mine: list[Score] | Exception = []
        if rank < len(turn):
            mine = _scores_or_error(model, tokenizer, turn[rank], options)
        # All learn of an error, or the others would wait for the one that has gone.
        errors: list[Any] = [None] * processes
        distributed.all_gather_object(errors, mine if isinstance(mine, Exception) else None)
        for error in errors:
            if error is not None:
                raise error
        gathered: list[Any] | None = [None] * processes if rank == 0 else None
        distributed.gather_object(mine, gathered, dst=0)
        for scores in gathered or ():
            yield from scores


def _scores_or_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block: Block, options: ScoringOptions
) -> list[Score] | Exception:
    try:
        return score_block(model, tokenizer, block, options)
    # Whatever it is, the other processes have to hear of it.
    except Exception as error:
        return error
