"""--explain: which characters a model did not expect, and what it would have expected, on the terminal and as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TextIO

from transformers import PreTrainedTokenizerFast

from reformer_lm.prediction.reports import on_one_line, score_line
from reformer_lm.scoring import Score

# Bits of surprise from which on a character has the next stronger tint. A bit is one question: 10 bits are one chance
# in 1,024.
TINT_BITS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
# Backgrounds of 256-colour terminals, from pale yellow to red; the letters on them are black.
_BACKGROUNDS = (230, 229, 222, 215, 209, 203)
_RESET = "\x1b[0m"
# Without colours: from this tint on a character stands in brackets.
_BRACKETED = 5
ALTERNATIVES = 3
_MOST_SURPRISING = 5


def tint(bits: float) -> int:
    """How strongly a character is tinted: 0 (not at all) to 6."""
    return sum(bits >= bound for bound in TINT_BITS)


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours: to a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def tinted(text: str, bits: Sequence[float], colours: bool) -> str:
    """A text whose characters show how little they were expected.

    Args:
        text: Of any length.
        bits: Surprise of each of its characters.
        colours: Backgrounds, or else brackets around what is tinted most.
    """
    parts = []
    begin = 0
    levels = [tint(value) for value in bits]
    while begin < len(text):
        end = begin + 1
        while end < len(text) and levels[end] == levels[begin]:
            end += 1
        run, level = on_one_line(text[begin:end]), levels[begin]
        if not colours:
            parts.append(f"[{run}]" if level >= _BRACKETED else run)
        else:
            parts.append(f"\x1b[38;5;16;48;5;{_BACKGROUNDS[level - 1]}m{run}{_RESET}" if level else run)
        begin = end
    return "".join(parts)


def legend(colours: bool) -> str:
    """What the tints mean, in a line."""
    if not colours:
        return f"[...]: less likely than one in {2 ** round(TINT_BITS[_BRACKETED - 1]):,}"
    bounds = [f"{low:g}" for low in TINT_BITS]
    cells = [f"\x1b[38;5;16;48;5;{colour}m {low} {_RESET}" for colour, low in zip(_BACKGROUNDS, bounds, strict=True)]
    return f"bits of surprise, from: {''.join(cells)}"


def bits_of_characters(score: Score) -> list[float]:
    """Surprise of each character of a text in bits."""
    return [value / math.log(2) for value in score.character_surprisals]


def explanation_lines(score: Score, tokenizer: PreTrainedTokenizerFast, colours: bool) -> list[str]:
    """A score with its text tinted, and below it the tokens that were expected least.

    Args:
        score: With alternatives.
        tokenizer: The model's.
        colours: Whether the terminal shows them.
    """
    if not score.tokens:
        return [score_line(score)]
    shown = tinted(score.text, bits_of_characters(score), colours)
    lines = ["\t".join([*score_line(score).split("\t")[:2], shown])]
    places = sorted(range(score.tokens), key=lambda place: -score.surprisals[place])[:_MOST_SURPRISING]
    for record in explain(_only(score, sorted(places)), tokenizer):
        if tint(record["bits"]) == 0:
            continue
        others = ", ".join(f"{on_one_line(one['token'])} {one['probability']:.1%}" for one in record["alternatives"])
        name = on_one_line(record["token"])
        lines.append(f"\t\t{name}  {record['bits']:.1f} bits, rank {record['rank']:,}; expected: {others}")
    return lines


def _only(score: Score, places: Sequence[int]) -> Score:
    """A score of some of its tokens, so that the others need not be decoded."""
    return replace(
        score,
        token_ids=tuple(score.token_ids[place] for place in places),
        surprisals=tuple(score.surprisals[place] for place in places),
        spans=tuple(score.spans[place] for place in places),
        ranks=tuple(score.ranks[place] for place in places),
        alternatives=tuple(score.alternatives[place] for place in places),
    )


def explain(score: Score, tokenizer: PreTrainedTokenizerFast, most: int | None = None) -> list[dict[str, Any]]:
    """Of each scored token its text, place, surprise in bits, rank, and what was likelier.

    Args:
        score: With alternatives.
        tokenizer: The model's.
        most: So many tokens from the beginning; None for all.

    Returns:
        One record a token, with plain values for JSON.
    """
    records: list[dict[str, Any]] = []
    tokens = zip(score.spans, score.surprisals, score.ranks, score.alternatives, strict=True)
    for (begin, end), surprisal, rank, likeliest in islice(tokens, most):
        records.append(
            {
                "token": score.text[begin:end] or tokenizer.eos_token,
                "begin": begin,
                "end": end,
                "bits": surprisal / math.log(2),
                "rank": rank,
                "alternatives": [
                    {"token": token_text(tokenizer, token), "probability": math.exp(value)}
                    for token, value in likeliest
                ],
            }
        )
    return records


def token_text(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """How a token looks in a text; special ones by their name."""
    text: str = tokenizer.decode([token])
    if text.strip():
        return text
    return "\n" if "\n" in text else str(tokenizer.convert_ids_to_tokens(token))
