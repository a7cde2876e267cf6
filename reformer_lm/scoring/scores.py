"""What scoring says of a text, and of many: likelihood, perplexity, bits per character."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        spans: Begin and end of each scored token in ``text``, in characters. Several tokens may be of one character
            (its bytes, where the vocabulary lacks it); the end of the article stands behind the last.
        ranks: For each scored token, how many tokens the model found at least as likely, itself included: 1 is the
            model's first choice. Empty unless alternatives were asked for.
        alternatives: For each scored token the likeliest tokens in its place, as pairs of id and natural logarithm of
            the probability, the likeliest first. Empty unless asked for.
    """

    text: str
    nll: float
    tokens: int
    unknown: int
    token_ids: tuple[int, ...]
    surprisals: tuple[float, ...]
    spans: tuple[tuple[int, int], ...] = ()
    ranks: tuple[int, ...] = ()
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def ppl(self) -> float:
        """Perplexity per token, exp(nll / tokens); nan for a text without tokens."""
        return _perplexity(self.nll, self.tokens)

    @property
    def characters(self) -> int:
        """Length of the text in characters (Unicode code points)."""
        return len(self.text)

    @property
    def character_surprisals(self) -> tuple[float, ...]:
        """What each character of the text adds to ``nll``, in nats.

        A token's surprisal is spread evenly over its characters, and tokens of one character add up; characters that
        the tokenizer drops have 0. The end of the article is in none; without ``add_eos`` they add up to ``nll``.
        """
        values = [0.0] * len(self.text)
        for (begin, end), surprisal in zip(self.spans, self.surprisals, strict=True):
            for place in range(begin, end):
                values[place] += surprisal / (end - begin)
        return tuple(values)

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
        self._add(score.tokens, score.unknown, score.characters, score.nll)

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Count a text by what was written down of it: tokens, unknown, characters, nll (null is infinite)."""
        nll = math.inf if record["nll"] is None else record["nll"]
        self._add(record["tokens"], record["unknown"], record["characters"], nll)

    def _add(self, tokens: int, unknown: int, characters: int, nll: float) -> None:
        self.texts += 1
        if tokens == 0:
            return
        self.scored_texts += 1
        self.tokens += tokens
        self.unknown += unknown
        self.characters += characters
        self.nll += nll
        self._sum_of_perplexities += _perplexity(nll, tokens)

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


def _perplexity(nll: float, count: int) -> float:
    if count == 0:
        return math.nan
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def _ratio(value: float, count: float) -> float:
    return value / count if count else math.nan
