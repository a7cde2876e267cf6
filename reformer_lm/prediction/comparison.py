"""--compare: which of two texts is more fluent, and in which places they differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

from reformer_lm.prediction.explanation import bits_of_characters, tinted
from reformer_lm.prediction.reports import format_perplexity, on_one_line, score_record
from reformer_lm.scoring import Score


@dataclass(frozen=True)
class Difference:
    """A place where two texts differ, or what lies between two such places.

    Attributes:
        kind: "equal", "replace", "delete" (missing from the second) or "insert" (missing from the first).
        first: Characters of the first text.
        second: Characters of the second.
        first_nll: What the first ones cost, in nats.
        second_nll: What the second ones cost.
    """

    kind: str
    first: str
    second: str
    first_nll: float
    second_nll: float


def differences(first: Score, second: Score) -> list[Difference]:
    """Lay two texts beside each other.

    Equal stretches are among the results, since what differs also changes what is expected after it: over all places
    the nats add up to those of the texts.
    """
    costs = first.character_surprisals, second.character_surprisals
    matcher = SequenceMatcher(a=first.text, b=second.text, autojunk=False)
    return [
        Difference(
            kind, first.text[a:b], second.text[c:d], math.fsum(costs[0][a:b]), math.fsum(costs[1][c:d])
        )
        for kind, a, b, c, d in matcher.get_opcodes()
    ]  # fmt: skip


def better(first: Score, second: Score) -> tuple[str, str]:
    """Which text is more fluent: the likelier one, and the one that costs less a character; "A", "B" or "neither"."""
    by_likelihood = _less(first.nll, second.nll)
    return by_likelihood, _less(first.bits_per_character, second.bits_per_character)


def _less(first: float, second: float) -> str:
    if first == second or math.isnan(first) or math.isnan(second):
        return "neither"
    return "A" if first < second else "B"


def comparison_lines(first: Score, second: Score, colours: bool) -> list[str]:
    """The comparison for people."""
    lines = []
    for name, score in (("A", first), ("B", second)):
        shown = tinted(score.text, bits_of_characters(score), colours)
        lines.append(
            f"{name}  PPL {format_perplexity(score.ppl)}, {score.nll:.2f} nats, {score.tokens} tokens, "
            f"{score.bits_per_character:.2f} bits per character: {shown}"
        )
    likelier, per_character = better(first, second)
    if likelier == "neither":
        lines.append("both are equally likely")
    else:
        lines.append(f"{likelier} is more fluent: {_odds(abs(first.nll - second.nll))} as likely as the other")
    if per_character not in ("neither", likelier) and first.characters != second.characters:
        lines.append(f"but of unequal length: per character {per_character} is ahead")
    places = differences(first, second)
    if any(place.kind != "equal" for place in places):
        lines.append("nats in A\tin B\tB - A\twhere")
    for place in places:
        if place.kind == "equal":
            where = f"  {_shortened(place.first)}"
        else:
            where = f"  {on_one_line(place.first) or '(nothing)'} -> {on_one_line(place.second) or '(nothing)'}"
        change = place.second_nll - place.first_nll
        if len(places) > 1:
            lines.append(f"{place.first_nll:9.2f}\t{place.second_nll:.2f}\t{change:+.2f}\t{where.strip()}")
    return lines


def _odds(nats: float) -> str:
    if nats < math.log(1e6):
        return f"{math.exp(nats):,.1f} times"
    return f"10^{nats / math.log(10):.1f} times" if math.isfinite(nats) else "infinitely many times"


def _shortened(text: str) -> str:
    """Equal stretches tell by their ends where they are."""
    text = on_one_line(text)
    return text if len(text) <= 20 else f"{text[:9]} ... {text[-9:]}"


def comparison_record(first: Score, second: Score) -> dict[str, Any]:
    """The comparison for programs."""
    likelier, per_character = better(first, second)
    return {
        "more_fluent": likelier,
        "more_fluent_per_character": per_character,
        "a": score_record(first, 0),
        "b": score_record(second, 1),
        "places": [asdict(place) for place in differences(first, second)],
    }
