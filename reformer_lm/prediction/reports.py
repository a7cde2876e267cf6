"""How predict.py writes results: for people, and as JSON lines for programs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import Any

from reformer_lm.generation import GeneratedText, GenerationSettings
from reformer_lm.scoring import Score, ScoreTotals

# Digits of a perplexity that are the same on any machine in single precision.
PERPLEXITY_DIGITS = 5
EMPTY = "(empty)"
_SURROGATE = re.compile("[\ud800-\udfff]")
_VISIBLE_BREAKS = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})


def format_perplexity(value: float) -> str:
    """A perplexity with five significant digits, without an exponent: 1.2346, 123.46, 123456; "-" for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    # Rounding first tells how many digits stand before the point: 99.9999 has three, as 100.00.
    exponent = int(f"{value:.{PERPLEXITY_DIGITS - 1}e}".partition("e")[2])
    return f"{value:.{max(0, PERPLEXITY_DIGITS - 1 - exponent)}f}"


def score_line(score: Score) -> str:
    """A score as three columns with tabs between them: perplexity, tokens, and the text on one line."""
    return f"{format_perplexity(score.ppl)}\t{score.tokens}\t{on_one_line(score.text) if score.tokens else EMPTY}"


def on_one_line(text: str) -> str:
    """A text with its line breaks and tabs written out, and what the terminal cannot encode replaced."""
    return text.translate(_VISIBLE_BREAKS).encode("utf-8", "replace").decode("utf-8")


def score_record(score: Score, index: int) -> dict[str, Any]:
    """A score for programs.

    Args:
        score: Of a text.
        index: Of the text among all, from 0.
    """
    return {
        "index": index,
        "text": score.text,
        "ppl": score.ppl,
        "nll": score.nll,
        "tokens": score.tokens,
        "unknown": score.unknown,
        "characters": score.characters,
        "ppl_per_character": score.ppl_per_character,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte,
    }


def totals_line(totals: ScoreTotals) -> str:
    """A corpus in one line, with both of the averages that are called its perplexity."""
    empty = totals.texts - totals.scored_texts
    return (
        f"total: {totals.texts} texts{f' ({empty} empty)' if empty else ''}, {totals.tokens} tokens, "
        f"{totals.unknown} unknown; PPL over all tokens {format_perplexity(totals.ppl)}, "
        f"mean PPL of the texts {format_perplexity(totals.mean_ppl)}, "
        f"PPL per character {format_perplexity(totals.ppl_per_character)}"
    )


def sample_header(sample: GeneratedText, prompts: int, samples: int) -> str:
    """The line above a sample when there are several."""
    parts = []
    if prompts > 1:
        parts.append(f"prompt {sample.prompt_index + 1} of {prompts}")
    if samples > 1:
        parts.append(f"sample {sample.sample_index + 1} of {samples}")
    return f"===== {', '.join(parts)} ====="


def sample_json(sample: GeneratedText, settings: GenerationSettings, seed: int) -> str:
    """A sample as a JSON object with all that is needed to make it again."""
    return to_json(
        {
            "prompt": sample.prompt,
            "text": sample.text,
            "sample": sample.sample_index,
            "tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "seed": seed,
            "settings": asdict(settings),
            "tokens_per_second": round(sample.tokens_per_second, 2),
        }
    )


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON with Chinese as it is; floats that JSON cannot write become null."""
    finite = _finite(record)
    line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    # JSON can write half of a surrogate pair, UTF-8 cannot.
    return line if _SURROGATE.search(line) is None else json.dumps(finite, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
