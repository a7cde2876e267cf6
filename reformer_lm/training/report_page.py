"""A run as one HTML page: result, curves, validations, samples, settings, machine.

The page needs nothing else: styles and pictures are in it, there is no script, and it forbids the browser to load
anything. Everything that comes from outside this file, texts above all, is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reformer_lm.pages.charts import Mark, Series, bucket_chart, line_chart, short_number
from reformer_lm.pages.document import document, escaped, section

# Older ones are in metrics.jsonl.
MAX_SAMPLES = 30
MAX_VALIDATIONS = 400


@dataclass(frozen=True)
class RunReport:
    """What the page tells.

    Attributes:
        outcome: How the run ended, in a few words.
        total_steps: That were asked for.
        lines: Of the run's metrics file.
        settings: Its model and training settings.
        starts: Its starts, oldest first.
    """

    outcome: str
    total_steps: int
    lines: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a measurement, without those that were not finite."""
        return [(line["step"], line[name]) for line in self.lines if isinstance(line.get(name), int | float)]

    def last(self, name: str) -> float | None:
        """The newest value of a measurement."""
        values = self.series(name)
        return values[-1][1] if values else None


def build_page(report: RunReport) -> str:
    """The page, as HTML."""
    parts = [
        _result(report),
        section("Curves", _curves(report), "wide"),
        section("Buckets", _buckets(report)),
        section("Validation by step", _validations(report)),
        section("Samples", _samples(report)),
        section("Settings", _settings(report)),
        section("Machine and versions", _machine(report)),
        section("Starts", _starts(report)),
    ]
    return document(_title(report), parts)


def _title(report: RunReport) -> str:
    folder = report.settings.get("training", {}).get("output_dir", "")
    return f"Training run {str(folder).rstrip('/')}".strip()


def _result(report: RunReport) -> str:
    first = report.starts[0] if report.starts else {}
    steps = max((line["step"] for line in report.lines), default=0)
    tiles: list[tuple[str, str, str]] = []
    best = best_validation(report)
    perplexities = report.series("validation/perplexity")
    if best is not None:
        tiles.append(("Best validation PPL", _perplexity(best[1]), f"at step {best[0]:,}"))
    if perplexities:
        first_ppl, last_ppl = perplexities[0], perplexities[-1]
        tiles.append(
            ("Last validation PPL", _perplexity(last_ppl[1]), f"{_perplexity(first_ppl[1])} at step {first_ppl[0]:,}")
        )
    tiles.append(("Steps", f"{steps:,}", f"of {report.total_steps:,}"))
    for label, name, note in (
        ("Tokens seen", "train/tokens_seen", ""),
        ("Tokens per second", "train/tokens_per_second", "at the end"),
    ):
        value = report.last(name)
        if value is not None:
            tiles.append((label, short_number(round(value)), note))
    seconds = report.last("train/seconds")
    if seconds is not None:
        tiles.append(("Time in steps", _duration(seconds), ""))
    memory = [
        (what, report.last(name))
        for what, name in (("GPU", "memory/cuda_peak_mib"), ("process", "memory/process_peak_mib"))
    ]
    peaks = [(what, value) for what, value in memory if value is not None]
    if peaks:
        what, value = peaks[0]
        rest = ", ".join(f"{name} {_mebibytes(size)}" for name, size in peaks[1:])
        tiles.append((f"Peak memory, {what}", _mebibytes(value), rest))
    skipped = report.last("train/skipped_steps")
    if skipped:
        tiles.append(("Steps left out", f"{skipped:,.0f}", "loss or gradient not finite"))
    cells = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}<small>{escaped(note)}</small></dd></div>"
        for label, value, note in tiles
    )
    started = f"started {first['time'][:16].replace('T', ' ')}" if isinstance(first.get("time"), str) else ""
    facts = [started, _model_in_words(report), str(first.get("precision", ""))]
    about = ", ".join(escaped(fact) for fact in facts if fact)
    return (
        f"<header>\n<h1>{escaped(_title(report))}</h1>\n<p><strong>{escaped(report.outcome)}</strong></p>\n"
        f'<p>{about}</p>\n<dl class="tiles">{cells}</dl>\n</header>'
    )


def _model_in_words(report: RunReport) -> str:
    model = report.settings.get("model", {})
    parameters = report.starts[-1].get("parameters") if report.starts else None
    words = [f"{short_number(parameters)} parameters"] if isinstance(parameters, int) else []
    if "num_hidden_layers" in model:
        words.append(f"{model['num_hidden_layers']} layers of width {model.get('hidden_size')}")
    return ", ".join(words)


def best_validation(report: RunReport) -> tuple[int, float | None, float] | None:
    """Step, perplexity (None if infinite) and loss of the first validation with the lowest loss; None without any."""
    lines = [line for line in report.lines if isinstance(line.get("validation/loss"), int | float)]
    if not lines:
        return None
    best = min(lines, key=lambda line: line["validation/loss"])
    return best["step"], best.get("validation/perplexity"), best["validation/loss"]


def _curves(report: RunReport) -> str:
    best = best_validation(report)
    figures = []
    for caption, key, log in (
        ("Loss, nats per token", "loss", False),
        ("Perplexity, logarithmic", "perplexity", True),
    ):
        mark = None
        if best is not None:
            value = best[2] if key == "loss" else best[1]
            if value:
                mark = Mark(best[0], value, f"best {short_number(value)}, step {best[0]:,}")
        series = [
            Series("training", report.series(f"train/{key}")),
            Series("validation", report.series(f"validation/{key}"), dots=True),
        ]
        figures.append(line_chart(caption, series, log=log, mark=mark))
    for caption, name, from_zero in (
        ("Learning rate", "train/learning_rate", True),
        ("Gradient norm, before clipping", "train/gradient_norm", True),
        ("Tokens per second", "train/tokens_per_second", True),
        ("Peak memory of the process, MiB", "memory/process_peak_mib", True),
        ("Peak memory of the GPU, MiB", "memory/cuda_peak_mib", True),
        ("Steps left out", "train/skipped_steps", True),
    ):
        figures.append(line_chart(caption, [Series(name.split("/")[1], report.series(name))], from_zero=from_zero))
    found = "\n".join(figure for figure in figures if figure)
    return f'<div class="figures">\n{found}\n</div>' if found else ""


def _buckets(report: RunReport) -> str:
    lines = [line for line in report.lines if any(name.startswith("buckets/") for name in line)]
    if not lines:
        return ""
    line = lines[-1]
    layers = sorted(
        ((int(name.rpartition("_")[2]), line[name]) for name in line if name.startswith("buckets/layer_")),
        key=lambda pair: pair[0],
    )
    largest = max(tokens for _, sizes in layers for tokens, _ in sizes)
    figures = []
    for layer, sizes in layers:
        total = sum(count for _, count in sizes)
        empty = sum(count for tokens, count in sizes if tokens == 0)
        caption = f"layer {layer}: largest {sizes[-1][0]:,}, {empty / total:.0%} empty"
        figures.append(bucket_chart(caption, [(tokens, count) for tokens, count in sizes], largest))
    return (
        f"<p>The tokens of a validation window at step {line['step']:,} by how many tokens their hash bucket holds, "
        "over all heads and rounds. A token sees the most recent ones of its bucket only: where most are in large "
        "buckets, what is far away is rarely found.</p>\n"
        f'<div class="figures small">\n{"".join(figures)}\n</div>'
    )


def _validations(report: RunReport) -> str:
    best = best_validation(report)
    rows = [line for line in report.lines if "validation/loss" in line]
    if best is None or not rows:
        return ""
    # The best one is told above, whether it is among them or not.
    left_out = f"<p>The last {MAX_VALIDATIONS} of {len(rows):,}.</p>\n" if len(rows) > MAX_VALIDATIONS else ""
    marked = next(line for line in rows if line["validation/loss"] == best[2])
    cells = []
    for line in rows[-MAX_VALIDATIONS:]:
        is_best = line is marked
        cells.append(
            f"<tr{' class=best' if is_best else ''}><td>{line['step']:,}</td>"
            f"<td>{_decimal(line['validation/loss'], 4)}</td><td>{_perplexity(line.get('validation/perplexity'))}</td>"
            f"<td>{'best' if is_best else ''}</td></tr>"
        )
    return (
        f'{left_out}<div class="scroll"><table class="numbers"><thead><tr><th>Step</th><th>Loss</th><th>PPL</th>'
        f"<th></th></tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
    )


def _samples(report: RunReport) -> str:
    samples = [(line["step"], line["sample"]) for line in report.lines if isinstance(line.get("sample"), str)]
    shown = list(reversed(samples[-MAX_SAMPLES:]))
    boxes = [
        f"<details{' open' if index == 0 else ''}><summary>Step {step:,}</summary>"
        f'<p class="sample" lang="zh">{escaped(text)}</p></details>'
        for index, (step, text) in enumerate(shown)
    ]
    more = f"<p>The last {MAX_SAMPLES} of {len(samples):,}.</p>\n" if len(samples) > MAX_SAMPLES else ""
    return more + "\n".join(boxes) if boxes else ""


def _settings(report: RunReport) -> str:
    tables = [
        f"<div><h3>{escaped(part)}</h3>{_table(report.settings[part])}</div>"
        for part in ("model", "training")
        if report.settings.get(part)
    ]
    return f'<div class="columns">{"".join(tables)}</div>' if tables else ""


def _machine(report: RunReport) -> str:
    if not report.starts:
        return ""
    newest = report.starts[-1]
    tables = [
        f"<div><h3>{escaped(title)}</h3>{_table(newest[key])}</div>"
        for title, key in (("Hardware", "hardware"), ("Versions", "versions"), ("Data", "data"))
        if isinstance(newest.get(key), Mapping)
    ]
    return f'<div class="columns">{"".join(tables)}</div>'


def _starts(report: RunReport) -> str:
    items = []
    for start in report.starts:
        commit = start.get("commit")
        made_of = ""
        if isinstance(commit, Mapping):
            changed = ", with changes that are not committed" if commit.get("has_changes") else ""
            made_of = f"<br>commit <code>{escaped(commit.get('hash'))}</code>{changed}"
        command = shlex.join([str(start.get("program", "")), *map(str, start.get("arguments", []))])
        items.append(
            f"<li>{escaped(start.get('time', ''))}, at step {escaped(start.get('step', 0))}, in "
            f"<code>{escaped(start.get('folder', ''))}</code><br><code>{escaped(command)}</code>{made_of}</li>"
        )
    return f"<ol>{''.join(items)}</ol>" if items else ""


def _table(content: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(key)}</th><td>{escaped(_value(value))}</td></tr>'
        for key, value in content.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _perplexity(value: float | None) -> str:
    # Of a perplexity that no float holds, the file has null.
    return "∞" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _decimal(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mebibytes(value: float) -> str:
    return f"{value / 1024:.1f} GiB" if value >= 10240 else f"{value:,.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest:02} s"
