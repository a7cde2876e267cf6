"""How likely a model finds a text: per-token surprisal, perplexity, bits per character.

The likelihood of a text is the product of its tokens' conditional probabilities, the first of which is
conditioned on the start of an article (``bos``). No token is left out and padding is never counted. A text
longer than the model's window is scored by windows that overlap: each window repeats ``context`` tokens of
the one before, which are read but not scored again, so every token is scored exactly once.

Sentences are run in batches, yet the number of a sentence does not depend on its company: the length to which
it is padded follows from its own length alone, and is a multiple of 16. Matrix products of such shapes add up
in the same order for one row as for many: measured on a CPU, the results are equal to the last bit, where odd
lengths move a surprisal by 4e-6. Where a device does otherwise, float32 results agree to about that much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.scoring.batches import Batch, cut_windows, plan_batches
from reformer_lm.text import encode_articles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Texts taken at a time by score_stream: enough to fill batches of every length, little enough to hold in
# memory.
TEXTS_PER_BLOCK = 1024
# Positions whose probabilities are normalised at once: [512, vocabulary] floats.
POSITIONS_PER_CHUNK = 512


@dataclass(frozen=True)
class Score:
    """The likelihood of one text.

    Attributes:
        text: The text as given.
        nll: Negative log likelihood of all scored tokens together, in nats.
        tokens: Number of scored tokens (with the end of the article, if that was asked for).
        unknown: How many of them are the unknown token, whose probability says little about the text.
        token_ids: The scored tokens.
        surprisals: Negative log likelihood of each scored token, in nats; they add up to ``nll``.
    """

    text: str
    nll: float
    tokens: int
    unknown: int
    token_ids: tuple[int, ...]
    surprisals: tuple[float, ...]

    @property
    def ppl(self) -> float:
        """Perplexity per token, exp(nll / tokens); nan for a text without tokens."""
        return _perplexity(self.nll, self.tokens)

    @property
    def characters(self) -> int:
        """Length of the text in characters (Unicode code points)."""
        return len(self.text)

    @property
    def ppl_per_character(self) -> float:
        """exp(nll / characters), which models with different tokenizers can be compared by; nan if empty."""
        return _perplexity(self.nll, self.characters)

    @property
    def bits_per_character(self) -> float:
        """Bits to encode one character, nll / (characters * ln 2); nan for an empty text."""
        return _ratio(self.nll, self.characters * math.log(2))

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode one byte of the text in UTF-8; nan for an empty text."""
        return _ratio(self.nll, len(self.text.encode("utf-8", "replace")) * math.log(2))


@dataclass
class ScoreTotals:
    """Sums over many scores; a text without tokens counts in ``texts`` only.

    Attributes:
        texts: Number of texts, empty ones included.
        scored_texts: Number of texts with at least one token.
        tokens: Scored tokens of all texts.
        unknown: Unknown tokens of all texts.
        characters: Characters of the scored texts.
        nll: Negative log likelihood of all texts together, in nats.
    """

    texts: int = 0
    scored_texts: int = 0
    tokens: int = 0
    unknown: int = 0
    characters: int = 0
    nll: float = 0.0
    _sum_of_perplexities: float = 0.0

    def add(self, score: Score) -> None:
        """Count one more text."""
        self.texts += 1
        if score.tokens == 0:
            return
        self.scored_texts += 1
        self.tokens += score.tokens
        self.unknown += score.unknown
        self.characters += score.characters
        self.nll += score.nll
        self._sum_of_perplexities += score.ppl

    @property
    def ppl(self) -> float:
        """Token-weighted perplexity, exp of the mean surprisal of all tokens: the PPL of a corpus."""
        return _perplexity(self.nll, self.tokens)

    @property
    def mean_ppl(self) -> float:
        """Arithmetic mean of the texts' perplexities: every text counts the same, however short."""
        return _ratio(self._sum_of_perplexities, self.scored_texts)

    @property
    def ppl_per_character(self) -> float:
        """Perplexity per character, exp of the mean surprisal of a character."""
        return _perplexity(self.nll, self.characters)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
    add_eos: bool = False,
    window: int | None = None,
    context: int | None = None,
) -> list[Score]:
    """Score texts; the result has their order.

    Args:
        model: A causal language model; it is run in evaluation mode, on the device where it is.
        tokenizer: Its tokenizer, with a ``bos_token`` that starts every article.
        texts: The texts to score.
        batch_size: Most rows in one forward pass.
        add_eos: Whether to score the end of the article after the last token, too.
        window: Most tokens the model reads at once; by default all that it can.
        context: Tokens of the window before that a further window repeats, from 1 to ``window``; by default
            half of the window. Only texts longer than the window are affected.

    Returns:
        One score for each text. A text without tokens has ``tokens`` 0, ``nll`` 0.0 and a perplexity of nan.

    Raises:
        InputError: If an option is out of range, or the tokenizer lacks a special token.
    """
    return list(
        score_stream(model, tokenizer, texts, batch_size=batch_size, add_eos=add_eos, window=window, context=context)
    )


def score_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
    add_eos: bool = False,
    window: int | None = None,
    context: int | None = None,
) -> Iterator[Score]:
    """Score texts as ``score`` does, holding no more than ``TEXTS_PER_BLOCK`` of them in memory.

    Args:
        model: See ``score``.
        tokenizer: See ``score``.
        texts: The texts to score, taken as needed.
        batch_size: See ``score``.
        add_eos: See ``score``.
        window: See ``score``.
        context: See ``score``.

    Returns:
        An iterator over the scores, in the order of the texts.

    Raises:
        InputError: See ``score``; raised at once.
    """
    window, context = _check_window(model, window, context)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no bos_token, on which the first token of a text is conditioned")
    if add_eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token, so the end of an article cannot be scored")
    return _score_blocks(model, tokenizer, texts, batch_size, add_eos, window, context)


def _score_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    batch_size: int,
    add_eos: bool,
    window: int,
    context: int,
) -> Iterator[Score]:
    """Take a block of texts, cut it into windows, run the windows, put the tokens together again."""
    remaining = iter(texts)
    while block := list(islice(remaining, TEXTS_PER_BLOCK)):
        articles = encode_articles(tokenizer, block)
        sequences = articles if add_eos else [article[:-1] for article in articles]
        windows = [
            piece for index, sequence in enumerate(sequences) for piece in cut_windows(index, sequence, window, context)
        ]
        surprisals = [[0.0] * (len(sequence) - 1) for sequence in sequences]
        with _evaluation(model):
            for batch in plan_batches(windows, batch_size, window, pad=_is_causal(model)):
                for piece, values in zip(batch.windows, _surprisals(model, batch), strict=True):
                    surprisals[piece.text_index][piece.first_scored : piece.end_scored] = values
        for text, sequence, values in zip(block, sequences, surprisals, strict=True):
            scored = tuple(sequence[1:])
            unknown = scored.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
            yield Score(text, math.fsum(values), len(scored), unknown, scored, tuple(values))


def _surprisals(model: PreTrainedModel, batch: Batch) -> list[list[float]]:
    """Run a batch; for each of its windows the surprisals, in nats, of the tokens that it scores."""
    rows = len(batch.windows)
    input_ids_BT = torch.zeros((rows, batch.length), dtype=torch.long)
    targets_BT = torch.zeros_like(input_ids_BT)
    for row, window in enumerate(batch.windows):
        input_ids_BT[row, : len(window.inputs)] = torch.tensor(window.inputs)
        targets_BT[row, : len(window.targets)] = torch.tensor(window.targets)
    # No attention mask: nothing that stands behind a token can reach it. A mask would make the model cut the
    # batch to its longest row, and the length would depend on the company.
    device = getattr(model, "device", torch.device("cpu"))
    logit_chunks = _logit_chunks(model, input_ids_BT.to(device))
    target_chunks = targets_BT.to(device).split(_chunk_length(rows), dim=1)
    values_BT = torch.cat(
        [_negative_log_likelihood(*chunk) for chunk in zip(logit_chunks, target_chunks, strict=True)], dim=1
    ).tolist()
    return [
        values_BT[row][len(window.inputs) - (window.end_scored - window.first_scored) : len(window.inputs)]
        for row, window in enumerate(batch.windows)
    ]


def _logit_chunks(model: PreTrainedModel, input_ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits of a batch, a few positions at a time: all of them at once may be gigabytes."""
    size = _chunk_length(input_ids_BT.shape[0])
    if isinstance(model, ReformerLMForCausalLM):
        for hidden in model.reformer(input_ids_BT).last_hidden_state.split(size, dim=1):
            yield model.compute_logits(hidden)
    else:
        # Another model may do more to its logits than apply its output layer.
        yield from model(input_ids=input_ids_BT).logits.split(size, dim=1)


def _chunk_length(rows: int) -> int:
    return max(1, POSITIONS_PER_CHUNK // rows)


def _negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, computed in float32 or better."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=dtype)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().cpu()


def _check_window(model: PreTrainedModel, window: int | None, context: int | None) -> tuple[int, int]:
    """Fill in the defaults of window and context and check them against what the model can read."""
    longest = int(model.config.max_position_embeddings)
    if window is None:
        window = longest
    if not 1 <= window <= longest:
        raise InputError(f"window must be from 1 to the model's {longest} tokens, got {window}")
    if context is None:
        context = max(1, window // 2)
    if not 1 <= context <= window:
        raise InputError(f"context must be from 1 to the window's {window} tokens, got {context}")
    return window, context


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether padding behind a token is invisible to it: not so in the chunked form of LSH attention."""
    return getattr(model.config, "lsh_mask", "causal") != "chunked"


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _perplexity(nll: float, count: int) -> float:
    if count == 0:
        return math.nan
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def _ratio(value: float, count: float) -> float:
    return value / count if count else math.nan
