"""Curves and bars as inline SVG: pictures that need neither a script nor a network nor a plotting library.

Colours come from the page's style sheet (classes ``s1``, ``s2`` ...), so that they follow its light or dark scheme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Of the drawing's own coordinates; the page scales it to the column's width. Narrow, so that on a phone letters stay
# nearly as large as they are here.
WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 28
# About as many points as a phone has columns of pixels for them.
MAX_POINTS = 200
BAR_WIDTH, BAR_HEIGHT = 220, 116


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: Step and value, in order; values are finite.
        dots: Whether each point is shown.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out.

    Attributes:
        step: Where.
        value: How high.
        text: Beside it.
    """

    step: float
    value: float
    text: str


@dataclass(frozen=True)
class _Scale:
    """From values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    caption: str, series: Sequence[Series], *, log: bool = False, from_zero: bool = False, mark: Mark | None = None
) -> str:
    """A figure of curves over steps; "" if there is nothing to show.

    Of more points than fit, neighbours are drawn as their mean, in a band from the least to the greatest.

    Args:
        caption: Above it.
        series: Up to two lines.
        log: Logarithmic values; those that are not positive are left out.
        from_zero: The axis begins at 0.
        mark: A point to point out.
    """
    kept = [Series(s.name, [p for p in s.points if not log or p[1] > 0], s.dots) for s in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return ""
    steps = [step for one in kept for step, _ in one.points]
    values = [value for one in kept for _, value in one.points]
    x = _Scale(*_widened(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    low, high = (_widened_log if log else _widened)(min(values), max(values))
    if from_zero:
        low = min(low, 0.0) if min(values) < 0 else 0.0
    y = _Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x, y)]
    numbers = {one.name: index + 1 for index, one in enumerate(series)}
    for one in kept:
        parts.append(_curve(one, numbers[one.name], x, y))
    if mark is not None:
        parts.append(_marked(mark, x, y))
    picture = _svg(WIDTH, HEIGHT, caption, "".join(parts))
    legend = ""
    if len(kept) > 1:
        items = (f'<span><i class="key s{numbers[one.name]}"></i>{html.escape(one.name)}</span>' for one in kept)
        legend = f'<p class="legend">{"".join(items)}</p>'
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{legend}{picture}</figure>"


def bucket_chart(caption: str, sizes: Sequence[tuple[int, int]], largest: int) -> str:
    """A small figure of which share of the tokens is in buckets of what size, sizes by powers of two.

    Of tokens and not of buckets, since one bucket that holds half of all tokens is what the figure must show.

    Args:
        caption: Above it.
        sizes: Tokens in a bucket, and the number of such buckets.
        largest: The size at the right end, so that several figures can be compared.
    """
    bars = max(largest, 1).bit_length()
    tokens, buckets = [0] * bars, [0] * bars
    for size, count in sizes:
        if size:
            tokens[size.bit_length() - 1] += size * count
            buckets[size.bit_length() - 1] += count
    total, most = sum(tokens) or 1, max(tokens) or 1
    step = (BAR_WIDTH - 8) / bars
    ground = BAR_HEIGHT - 18
    parts = [f'<line class="axis" x1="4" x2="{BAR_WIDTH - 4}" y1="{ground}" y2="{ground}"/>']
    for index, count in enumerate(tokens):
        left = 4 + index * step
        # Every second one has room for its number.
        if index % 2 == 0:
            parts.append(
                f'<text class="middle" x="{left + step / 2:.1f}" y="{BAR_HEIGHT - 4}">{short_number(2**index)}</text>'
            )
        if count:
            height = max(1.0, count / most * (ground - 6))
            name = "1 token" if index == 0 else f"{2**index:,} to {2 ** (index + 1) - 1:,} tokens"
            parts.append(
                f'<rect class="bar" x="{left + 1:.1f}" width="{step - 2:.1f}" y="{ground - height:.1f}" '
                f'height="{height:.1f}"><title>{buckets[index]:,} buckets of {name} hold {count / total:.1%} of all'
                "</title></rect>"
            )
    picture = _svg(BAR_WIDTH, BAR_HEIGHT, caption, "".join(parts))
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>"


def histogram(caption: str, bars: Sequence[tuple[float, float, int]], unit: str) -> str:
    """A figure of how many things lie in which range; "" without any.

    Args:
        caption: Above it.
        bars: Low end, high end and number of each range, in order and without gaps.
        unit: What is counted, for the numbers that appear under the pointer.
    """
    total, most = sum(count for *_, count in bars), max((count for *_, count in bars), default=0)
    if not most:
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    ground = HEIGHT - BOTTOM
    scale = _Scale(0, most, ground, TOP)
    parts = []
    for value in _ticks(0, most, 4):
        at = f"{scale(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{scale(value) + 4:.1f}">{short_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ground}" y2="{ground}"/>')
    # Numbers stand at the edges between bars, as many as have room.
    every = -(-len(bars) // 6)
    for index, (low, high, count) in enumerate(bars):
        left = LEFT + index * step
        if index % every == 0:
            parts.append(f'<text class="middle" x="{left:.1f}" y="{HEIGHT - 10}">{short_number(low)}</text>')
        if count:
            top = min(scale(count), ground - 1)
            parts.append(
                f'<rect class="bar" x="{left + 1:.1f}" width="{step - 2:.1f}" y="{top:.1f}" '
                f'height="{ground - top:.1f}"><title>{short_number(low)} to {short_number(high)}: {count:,} '
                f"{html.escape(unit)} ({count / total:.1%})</title></rect>"
            )
    picture = _svg(WIDTH, HEIGHT, caption, "".join(parts))
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>"


def short_number(value: float) -> str:
    """A number in a few characters: 3e-4, 0.25, 12.5, 4,096, 1.2M."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        for limit, letter in ((1e9, "G"), (1e6, "M")):
            if size >= limit:
                return f"{value / limit:.4g}{letter}" if size < 1e13 else f"{value:.1e}".replace("e+", "e")
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _svg(width: int, height: int, label: str, content: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">{content}</svg>'


def _grid(x: _Scale, y: _Scale) -> str:
    parts = []
    for value in _log_ticks(y.low, y.high) if y.log else _ticks(y.low, y.high, 4):
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{short_number(value)}</text>')
    for value in _ticks(x.low, x.high, 4):
        if value == int(value):
            # Beside the right edge the number ends there, so that it is not cut off.
            side, at = ("end", f"{WIDTH - 2}") if x(value) > WIDTH - 30 else ("middle", f"{x(value):.1f}")
            parts.append(f'<text class="{side}" x="{at}" y="{HEIGHT - 10}">{short_number(value)}</text>')
    ground = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ground}" y2="{ground}"/>')
    return "".join(parts)


def _curve(series: Series, number: int, x: _Scale, y: _Scale) -> str:
    points = _thinned(series.points)
    parts = []
    if len(points) < len(series.points):
        upper = [f"{x(step):.1f},{y(high):.1f}" for step, _, _, high in points]
        lower = [f"{x(step):.1f},{y(low):.1f}" for step, _, low, _ in reversed(points)]
        parts.append(f'<polygon class="band s{number}" points="{" ".join(upper + lower)}"/>')
    line = " ".join(f"{x(step):.1f},{y(mean):.1f}" for step, mean, _, _ in points)
    parts.append(f'<polyline class="line s{number}" points="{line}"/>')
    visible = "dot" if series.dots or len(points) == 1 else "hit"
    radius = 3.5 if visible == "dot" else 5
    for step, mean, _, _ in points:
        parts.append(
            f'<circle class="{visible} s{number}" cx="{x(step):.1f}" cy="{y(mean):.1f}" r="{radius}">'
            f"<title>step {step:,.0f}: {html.escape(series.name)} {short_number(mean)}</title></circle>"
        )
    return "".join(parts)


def _marked(mark: Mark, x: _Scale, y: _Scale) -> str:
    at, height = x(mark.step), y(mark.value)
    # Towards the middle and well away from the curve, which is flat about its best point.
    side = "end" if at > WIDTH / 2 else "start"
    below = height < TOP + 70
    end = height + 48 if below else height - 48
    near = height + 7 if below else height - 7
    text = html.escape(mark.text)
    return (
        f'<circle class="ring" cx="{at:.1f}" cy="{height:.1f}" r="6.5"/>'
        f'<line class="leader" x1="{at:.1f}" x2="{at:.1f}" y1="{near:.1f}" y2="{end:.1f}"/>'
        f'<text class="{side} strong" x="{at:.1f}" y="{end + 12 if below else end - 5:.1f}">{text}</text>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Step, mean, least and greatest value of groups of neighbours, at most MAX_POINTS of them."""
    if len(points) <= MAX_POINTS:
        return [(step, value, value, value) for step, value in points]
    borders = [len(points) * index // MAX_POINTS for index in range(MAX_POINTS + 1)]
    groups = [points[begin:end] for begin, end in pairwise(borders)]
    return [
        (
            math.fsum(step for step, _ in group) / len(group),
            math.fsum(value for _, value in group) / len(group),
            min(value for _, value in group),
            max(value for _, value in group),
        )
        for group in groups
    ]


def _widened(low: float, high: float) -> tuple[float, float]:
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _widened_log(low: float, high: float) -> tuple[float, float]:
    return (low / 1.5, high * 1.5) if low == high else (low, high)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about ``count`` of them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    # Through whole multiples: adding up would leave 0.30000000000000004.
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    # Less than a decade: round numbers at equal distances.
    return _ticks(low, high, 4)
