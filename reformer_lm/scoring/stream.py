"""Scoring texts: per-token surprisal and perplexity, in any number and of any length.

The likelihood of a text is the product of its tokens' conditional probabilities, the first of which is
conditioned on the start of an article (``bos``). No token is left out and padding is never counted. A text
longer than the model's window is scored by windows that overlap: each window repeats ``context`` tokens of
the one before, which are read but not scored again, so every token is scored exactly once.

Sentences are run in batches, yet the number of a sentence does not depend on its company: the length to which
it is padded follows from its own length alone, and a batch never has so few tokens that products of few rows would
be taken for it. Measured on a CPU, the results are equal to the last bit; where a device adds up otherwise, float32
results agree to some 1e-6 a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from reformer_lm.errors import InputError
from reformer_lm.scoring.batches import TOKENS_PER_BATCH, cut_windows, plan_batches
from reformer_lm.scoring.forward import TokenScores, evaluation
from reformer_lm.scoring.scores import Score
from reformer_lm.scoring.threads import score_batches
from reformer_lm.text import locate_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Texts taken at a time by score_stream: enough to fill batches of every length, little enough to hold in
# memory. A block ends earlier where its texts are long.
TEXTS_PER_BLOCK = 2048
CHARACTERS_PER_BLOCK = 1 << 20

Block = list[tuple[str, str]]


@dataclass(frozen=True)
class ScoringOptions:
    """How to score; see `score` for the meaning of each.

    Attributes:
        batch_size: Most windows in one forward pass, None for no limit.
        batch_tokens: Most tokens in one forward pass, padding included, unless a single window is longer.
        add_eos: Whether the end of the article is scored.
        window: Most tokens read at once.
        context: Tokens that a further window repeats.
        alternatives: Likeliest tokens to tell in each place.
    """

    batch_size: int | None
    batch_tokens: int
    add_eos: bool
    window: int
    context: int
    alternatives: int


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    prefixes: Iterable[str] | None = None,
    batch_size: int | None = None,
    batch_tokens: int = TOKENS_PER_BATCH,
    add_eos: bool = False,
    window: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    alternatives: int = 0,
) -> list[Score]:
    """Score texts; the result has their order.

    Args:
        model: A causal language model; it is run in evaluation mode, on the device where it is.
        tokenizer: Its tokenizer, with a ``bos_token`` that starts every article.
        texts: The texts to score.
        prefixes: What stands before each text, one for each: it is read and not scored, so that the result is the
            likelihood of the text given its prefix. The two are tokenised apart.
        batch_size: Most windows in one forward pass; None for as many as ``batch_tokens`` allows.
        batch_tokens: Most tokens in one forward pass, padding included, unless a single window is longer.
        add_eos: Whether to score the end of the article after the last token, too.
        window: Most tokens the model reads at once; by default all that it can.
        context: Tokens that a further window reads before its first scored token, from 1 to ``window``; by default
            half of the window. Only texts longer than the window are affected.
        stride: The same said otherwise: tokens that a further window scores, ``window + 1 - context``.
        alternatives: If above 0, tell each token's rank, and so many of the likeliest tokens in its place.

    Returns:
        One score for each text. A text without tokens has ``tokens`` 0, ``nll`` 0.0 and a perplexity of nan.

    Raises:
        InputError: If an option is out of range, the tokenizer lacks a special token, or there are not as many
            prefixes as texts.
    """
    return list(
        score_stream(
            model, tokenizer, texts, prefixes=prefixes, batch_size=batch_size, batch_tokens=batch_tokens,
            add_eos=add_eos, window=window, context=context, stride=stride, alternatives=alternatives,
        )
    )  # fmt: skip


def score_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    prefixes: Iterable[str] | None = None,
    batch_size: int | None = None,
    batch_tokens: int = TOKENS_PER_BATCH,
    add_eos: bool = False,
    window: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    alternatives: int = 0,
) -> Iterator[Score]:
    """Score texts as ``score`` does, holding no more than ``TEXTS_PER_BLOCK`` of them in memory.

    Args:
        model: See ``score``.
        tokenizer: See ``score``.
        texts: The texts to score, taken as needed.
        prefixes: See ``score``; taken as needed.
        batch_size: See ``score``.
        batch_tokens: See ``score``.
        add_eos: See ``score``.
        window: See ``score``.
        context: See ``score``.
        stride: See ``score``.
        alternatives: See ``score``.

    Returns:
        An iterator over the scores, in the order of the texts.

    Raises:
        InputError: See ``score``; raised at once, but for a wrong number of prefixes.
    """
    options = check_options(
        model, tokenizer, batch_size=batch_size, batch_tokens=batch_tokens, add_eos=add_eos, window=window,
        context=context, stride=stride, alternatives=alternatives,
    )  # fmt: skip
    return (
        scored
        for block in blocks_of(texts, prefixes)
        for scored in score_block(model, tokenizer, block, options)
    )  # fmt: skip


def check_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch_size: int | None,
    batch_tokens: int,
    add_eos: bool,
    window: int | None,
    context: int | None,
    stride: int | None,
    alternatives: int,
) -> ScoringOptions:
    """Fill in defaults and check all against model and tokenizer; arguments and errors are those of ``score``."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if alternatives < 0:
        raise InputError(f"alternatives must be at least 0, got {alternatives}")
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    if window is None:
        if longest is None:
            kind = model.config.model_type
            raise InputError(f"how many tokens a {kind} model reads at once is not known; give a window")
        window = int(longest)
    if not 1 <= window <= (longest or window):
        raise InputError(f"window must be from 1 to the model's {longest} tokens, got {window}")
    if stride is not None:
        if not 1 <= stride <= window:
            raise InputError(f"stride must be from 1 to the window's {window} tokens, got {stride}")
        if context is not None and context != window + 1 - stride:
            raise InputError(
                f"stride {stride} and context {context} do not fit the window of {window} tokens; give one of them: "
                f"that stride means a context of {window + 1 - stride}"
            )
        context = window + 1 - stride
    if context is None:
        context = max(1, window // 2)
    if not 1 <= context <= window:
        raise InputError(f"context must be from 1 to the window's {window} tokens, got {context}")
    if tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no bos_token, on which the first token of a text is conditioned")
    if add_eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token, so the end of an article cannot be scored")
    return ScoringOptions(batch_size, batch_tokens, add_eos, window, context, alternatives)


def blocks_of(texts: Iterable[str], prefixes: Iterable[str] | None) -> Iterator[Block]:
    """Texts with their prefixes, as many at a time as are scored together.

    Args:
        texts: To score.
        prefixes: One for each text, or None for none.

    Yields:
        Pairs of prefix and text, bounded in number and, but for a single text, in characters.

    Raises:
        InputError: If there are not as many prefixes as texts.
    """
    block: Block = []
    characters = 0
    pairs = zip(repeat("") if prefixes is None else prefixes, texts, strict=prefixes is not None)
    try:
        for prefix, text in pairs:
            block.append((prefix, text))
            characters += len(prefix) + len(text)
            if len(block) == TEXTS_PER_BLOCK or characters >= CHARACTERS_PER_BLOCK:
                yield block
                block, characters = [], 0
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise InputError("there are not as many prefixes as texts; give one for each text") from None
    if block:
        yield block


def score_block(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block: Block, options: ScoringOptions
) -> list[Score]:
    """Cut texts into windows, run the windows, put the tokens together again.

    Args:
        model: See ``score``.
        tokenizer: See ``score``.
        block: Pairs of prefix and text.
        options: From `check_options`.

    Returns:
        The scores, in the block's order.
    """
    located = locate_tokens(tokenizer, [text for _, text in block])
    prefixes = [prefix for prefix, _ in block]
    before = [ids for ids, _ in locate_tokens(tokenizer, prefixes)] if any(prefixes) else [[]] * len(block)
    windows = []
    for index, ((ids, spans), prefix_ids) in enumerate(zip(located, before, strict=True)):
        if options.add_eos:
            ids.append(tokenizer.eos_token_id)
            spans.append((len(block[index][1]),) * 2)
        sequence = [tokenizer.bos_token_id, *prefix_ids, *ids]
        windows += cut_windows(index, sequence, options.window, options.context, first=len(prefix_ids))
    found: list[list[tuple[int, TokenScores]]] = [[] for _ in block]
    with evaluation(model):
        batches = plan_batches(windows, options.batch_size, options.window, options.batch_tokens, pad=_is_causal(model))
        for batch, results in zip(batches, score_batches(model, batches, options.alternatives), strict=True):
            for window, scored in zip(batch.windows, results, strict=True):
                found[window.text_index].append((window.first_scored, scored))
    scores = []
    for (_, text), (ids, spans), pieces in zip(block, located, found, strict=True):
        parts = [scored for _, scored in sorted(pieces, key=lambda piece: piece[0])]
        surprisals = tuple(value for part in parts for value in part.surprisals)
        unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        scores.append(
            Score(
                text, math.fsum(surprisals), len(ids), unknown, tuple(ids), surprisals, tuple(spans),
                ranks=tuple(rank for part in parts for rank in part.ranks),
                alternatives=tuple(pairs for part in parts for pairs in part.alternatives),
            )
        )  # fmt: skip
    return scores


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether padding behind a token is invisible to it: not so in the chunked form of LSH attention."""
    return getattr(model.config, "lsh_mask", "causal") != "chunked"
