"""--html: scores as one page with heat maps of the sentences, a histogram, and the least fluent passages."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from reformer_lm.errors import InputError
from reformer_lm.pages.charts import histogram
from reformer_lm.pages.document import document, escaped, section
from reformer_lm.prediction.explanation import TINT_BITS, bits_of_characters, explain, tint
from reformer_lm.prediction.reports import format_perplexity
from reformer_lm.scoring import Score, ScoreTotals

# A page of more is slow to open and not read. Of more texts the least fluent are shown, of a longer text its beginning.
MAX_TEXTS = 300
MAX_TOKENS_OF_A_TEXT = 3000
MAX_PASSAGES = 20
PASSAGE_CHARACTERS = 16
PASSAGES_OF_A_TEXT = 3
# Around a passage, so that one sees where it stands.
CONTEXT_CHARACTERS = 12
ALTERNATIVES = 5
# Ranges of the histogram: so many to a doubling of the perplexity.
BARS_PER_DOUBLING = 2

STYLE = """
:root {
  --h1: #fff8d6; --h2: #ffeeb0; --h3: #ffdc8a; --h4: #ffc069; --h5: #ff9b5c; --h6: #ff7358;
}
@media (prefers-color-scheme: dark) {
  :root { --h1: #2b2712; --h2: #40370f; --h3: #5b4509; --h4: #7a4a08; --h5: #98430f; --h6: #b8321f; }
}
.heat { font-size: 1.15rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 8px; }
.heat span { padding: 3px 0; cursor: help; }
.heat span:hover { outline: 2px solid var(--ink); }
.t1 { background: var(--h1); } .t2 { background: var(--h2); } .t3 { background: var(--h3); }
.t4 { background: var(--h4); } .t5 { background: var(--h5); } .t6 { background: var(--h6); }
.soft { color: var(--soft); }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 0; font-size: 0.85rem; color: var(--soft); }
.scale span { color: var(--ink); padding: 2px 10px; }
.scale em { font-style: normal; margin-right: 10px; }
summary b { color: var(--ink); font-variant-numeric: tabular-nums; margin-right: 10px; }
.passages td { vertical-align: baseline; } .passages td:last-child { font-size: 1.05rem; line-height: 1.9; }
"""


@dataclass(frozen=True)
class _Passage:
    bits: float
    text_number: int
    before: str
    passage: str
    after: str
    levels: tuple[int, ...]


@dataclass(frozen=True)
class _ShownText:
    tokens: int
    bits_per_character: float
    heat: str


@dataclass
class FluencyPage:
    """Collects what the page shows, in bounded memory.

    Args:
        tokenizer: The model's.
        settings: What the scores depend on, for the reader.
    """

    tokenizer: PreTrainedTokenizerFast
    settings: Mapping[str, Any]
    totals: ScoreTotals = field(default_factory=ScoreTotals)
    _bars: Counter[int] = field(default_factory=Counter)
    _endless: int = 0
    # Heaps whose smallest element, the most fluent, gives way; a number of its own decides between equals.
    _texts: list[tuple[float, int, _ShownText]] = field(default_factory=list)
    _passages: list[tuple[float, int, _Passage]] = field(default_factory=list)

    def add(self, score: Score) -> None:
        """Count one more text.

        Args:
            score: With alternatives.
        """
        self.totals.add(score)
        number = self.totals.texts
        if not score.tokens:
            return
        if math.isfinite(score.ppl):
            self._bars[math.floor(math.log2(score.ppl) * BARS_PER_DOUBLING)] += 1
        else:
            self._endless += 1
        if _enters(self._texts, (score.ppl, -number), MAX_TEXTS):
            shown = _ShownText(score.tokens, score.bits_per_character, self._heat(score))
            _push(self._texts, (score.ppl, -number, shown), MAX_TEXTS)
        for order, passage in enumerate(_worst_passages(score, number)):
            _push(self._passages, (passage.bits, -number * PASSAGES_OF_A_TEXT - order, passage), MAX_PASSAGES)

    def write(self, path: Path) -> None:
        """Write the page.

        Raises:
            InputError: If the file cannot be written.
        """
        try:
            path.write_text(self.build(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--html {path}: cannot be written ({error.strerror}); give another file") from None

    def build(self) -> str:
        """The page, as HTML."""
        parts = [
            self._head(),
            section("How many texts have which PPL", self._histogram()),
            section("Least fluent passages", self._table_of_passages()),
            section("Texts", self._heat_maps()),
            section("How this was scored", self._how()),
        ]
        return document("Fluency", parts, style=STYLE)

    def _head(self) -> str:
        totals = self.totals
        empty = totals.texts - totals.scored_texts
        tiles = [
            ("PPL over all tokens", format_perplexity(totals.ppl), "each token counts the same"),
            ("Mean PPL of the texts", format_perplexity(totals.mean_ppl), "each text counts the same"),
            ("PPL per character", format_perplexity(totals.ppl_per_character), "comparable between models"),
            ("Texts", f"{totals.texts:,}", f"{empty:,} of them empty" if empty else ""),
            ("Tokens", f"{totals.tokens:,}", f"{totals.characters:,} characters"),
            ("Unknown tokens", f"{totals.unknown:,}", "their score says little" if totals.unknown else ""),
        ]
        cells = "".join(
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(note)}</small></dd></div>"
            for name, value, note in tiles
        )
        return f'<header><h1>How fluent a model finds these texts</h1></header>\n<dl class="tiles">{cells}</dl>'

    def _histogram(self) -> str:
        if not self._bars:
            return ""
        bounds = range(min(self._bars), max(self._bars) + 1)
        bars = [(2 ** (k / BARS_PER_DOUBLING), 2 ** ((k + 1) / BARS_PER_DOUBLING), self._bars[k]) for k in bounds]
        chart = histogram("Number of texts by their PPL (logarithmic)", bars, "texts")
        note = f"<p>{self._endless:,} texts have an infinite PPL.</p>" if self._endless else ""
        return f'<div class="figures">{chart}</div>{note}'

    def _table_of_passages(self) -> str:
        rows = []
        for _, _, passage in sorted(self._passages, key=lambda entry: entry[:2], reverse=True):
            heat = "".join(
                f'<span class="t{level}">{escaped(character)}</span>'
                for character, level in zip(passage.passage, passage.levels, strict=True)
            )
            rows.append(
                f"<tr><td>{passage.bits:.1f}</td><td>{passage.text_number:,}</td>"
                f'<td><span class="soft">{escaped(passage.before)}</span>{heat}'
                f'<span class="soft">{escaped(passage.after)}</span></td></tr>'
            )
        if not rows:
            return ""
        head = "<tr><th>bits per character</th><th>text</th><th>passage</th></tr>"
        return (
            f"<p>Stretches of {PASSAGE_CHARACTERS} characters that the model expected least.</p>"
            f'<div class="scroll"><table class="passages"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
            "</div>"
        )

    def _heat_maps(self) -> str:
        chosen = sorted(self._texts, key=lambda entry: entry[:2], reverse=True)
        if not chosen:
            return ""
        left_out = self.totals.scored_texts - len(chosen)
        note = f" The {len(chosen)} least fluent of {self.totals.scored_texts:,} are shown." if left_out else ""
        key = "".join(f'<span class="t{level}">{low:g}</span>' for level, low in enumerate(TINT_BITS, start=1))
        # All are open where the page is short enough to be read from top to bottom.
        state = " open" if len(chosen) <= 50 else ""
        maps = [
            f"<details{state}><summary><b>{format_perplexity(perplexity)}</b>text {-number:,}, "
            f"{shown.tokens:,} tokens, {shown.bits_per_character:.2f} bits per character</summary>"
            f'<p class="heat">{shown.heat}</p></details>'
            for perplexity, number, shown in chosen
        ]
        return (
            f"<p>The least fluent first.{note} The stronger a token's tint, the less the model expected it; under the "
            "pointer stands what it expected.</p>"
            f'<p class="scale"><em>bits of surprise, from</em>{key}</p>' + "\n".join(maps)
        )

    def _heat(self, score: Score) -> str:
        parts: list[str] = []
        behind = 0
        for record in explain(score, self.tokenizer, MAX_TOKENS_OF_A_TEXT):
            begin, end = record["begin"], record["end"]
            if begin < behind or begin == end:
                # Another byte of the same character, or the end of the article.
                continue
            expected = ", ".join(
                f"{one['token']} {one['probability']:.1%}".replace("\n", "\\n") for one in record["alternatives"]
            )
            about = f"{record['bits']:.1f} bits, rank {record['rank']:,}; expected: {expected}"
            parts.append(escaped(score.text[behind:begin]))
            kind, shown = f"t{tint(record['bits'])}", escaped(score.text[begin:end])
            parts.append(f'<span class="{kind}" title="{escaped(about)}">{shown}</span>')
            behind = end
        rest = len(score.text) - behind
        if score.tokens > MAX_TOKENS_OF_A_TEXT:
            parts.append(f'<span class="soft"> ... and {rest:,} more characters</span>')
        else:
            parts.append(escaped(score.text[behind:]))
        return "".join(parts)

    def _how(self) -> str:
        rows = "".join(
            f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>'
            for name, value in self.settings.items()
        )
        return (
            "<p>The first token of each text is conditioned on the start of an article; no token is left out and "
            "padding is never scored. PPL is exp(nats / tokens).</p>"
            f"<table>{rows}</table>"
        )


def _enters(heap: list[tuple[float, int, Any]], key: tuple[float, int], most: int) -> bool:
    """Whether an entry is among the greatest."""
    return len(heap) < most or key > heap[0][:2]


def _push(heap: list[tuple[float, int, Any]], entry: tuple[float, int, Any], most: int) -> None:
    """Keep the greatest entries."""
    if len(heap) < most:
        heapq.heappush(heap, entry)
    elif _enters(heap, entry[:2], most):
        heapq.heapreplace(heap, entry)


def _worst_passages(score: Score, number: int) -> list[_Passage]:
    """The stretches of a text with the highest mean surprise, not overlapping, the worst first."""
    bits = bits_of_characters(score)
    width = min(PASSAGE_CHARACTERS, len(bits))
    sums = [0.0, *accumulate(bits)]
    means = [(sums[begin + width] - sums[begin]) / width for begin in range(len(bits) - width + 1)]
    found: list[_Passage] = []
    taken: list[int] = []
    for begin in sorted(range(len(means)), key=lambda begin: -means[begin]):
        if any(abs(begin - other) < width for other in taken):
            continue
        taken.append(begin)
        end = begin + width
        found.append(
            _Passage(
                means[begin], number, score.text[max(0, begin - CONTEXT_CHARACTERS) : begin], score.text[begin:end],
                score.text[end : end + CONTEXT_CHARACTERS], tuple(tint(value) for value in bits[begin:end]),
            )
        )  # fmt: skip
        if len(found) == PASSAGES_OF_A_TEXT:
            break
    return found
