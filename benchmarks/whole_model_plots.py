"""A picture of whole models for docs/benchmarks.md: memory, training steps and decoding, from result files.

    python benchmarks/whole_model_plots.py amd_epyc_avx2

Reads benchmarks/results/memory_<machine>.json, train_step_<machine>.json and generation_<machine>.json, those that
are there, and writes docs/images/whole_model_<machine>.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_plots import format_tokens
from machine import RESULTS, ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart also without colours. After Okabe and Ito; the colours of attention_plots.py.
_LOOK: dict[str, dict[str, Any]] = {
    "ours": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "markersize": 6.5, "label": "ours"},
    "keep_attention": {"color": "#E69F00", "marker": "v", "label": 'ours, "keep_attention"'},
    "off": {"color": "#CC79A7", "marker": "P", "label": 'ours, reversible "off"'},
    "reformer_pytorch": {"color": "#0072B2", "marker": "s", "label": "reformer-pytorch"},
    "transformers_reformer": {"color": "#009E73", "marker": "^", "label": "transformers' Reformer"},
    "gpt2": {"color": "#4D4D4D", "marker": "D", "label": "GPT-2 (SDPA)"},
    "gpt2_checkpointing": {"color": "#8C8C8C", "marker": "d", "label": "GPT-2, checkpointing"},
    "gpt2_lean": {"color": "#8C8C8C", "marker": "x", "label": "GPT-2, checkpointing, our loss"},
}


def _load(name: str, machine: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}_{machine}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _lines(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    for name, look in _LOOK.items():
        if points := sorted(lines.get(name, [])):
            axes.plot(*zip(*points, strict=True), **{"linewidth": 1.5, "markersize": 5, **look})
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _memory_against_depth(axes: Axes, results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["tokens"] == 4096 and not row["update"] and "bytes" in row]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["contender"], []).append((row["depth"], row["bytes"] / 2**20))
    _lines(axes, lines)
    axes.set_title("Memory of a training step, 4,096 tokens", fontsize=10.5, loc="left")
    axes.set_xlabel("layers")
    axes.set_ylabel("MiB above the built model, gradients included")
    axes.set_xticks(sorted({row["depth"] for row in rows}))


def _step_against_length(axes: Axes, results: dict[str, Any]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    groups = [group for group in results["groups"] if group["hidden_size"] == 512]
    for group in groups:
        for name, entry in group["contenders"].items():
            lines.setdefault(name, []).append((group["tokens"], entry["median_s"]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _lines(axes, lines)
    lengths = sorted({group["tokens"] for group in groups})
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.set_title("Time of a training step, six layers", fontsize=10.5, loc="left")
    axes.set_xlabel("tokens")


def _latency_against_context(axes: Axes, results: dict[str, Any]) -> None:
    rows = results["latency"]["rows"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["contender"], []).append((row["context"], 1000 * row["median_s"]))
    axes.set_xscale("log", base=2)
    _lines(axes, lines)
    contexts = sorted({row["context"] for row in rows})
    axes.set_xticks(contexts, [format_tokens(context) for context in contexts])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
    axes.set_title("One more token after a context", fontsize=10.5, loc="left")
    axes.set_xlabel("tokens of context")


def draw(machine: str, path: Path) -> None:
    """Draws what has been measured of a machine.

    Args:
        machine: what stands between the benchmark's name and ".json" in the names of its result files.
        path: of the picture.

    Raises:
        SystemExit: there is no result file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "memory": _memory_against_depth,
        "train_step": _step_against_length,
        "generation": _latency_against_context,
    }
    found = {name: results for name in panels if (results := _load(name, machine))}
    if not found:
        raise SystemExit(f"error: no memory_{machine}.json, train_step_{machine}.json or generation_{machine}.json")
    figure, axes = pyplot.subplots(1, len(found), figsize=(4.9 * len(found), 4.6), dpi=130, squeeze=False)
    for each, (name, results) in zip(axes[0], found.items(), strict=True):
        panels[name](each, results)
    any_results = next(iter(found.values()))
    hardware = any_results["machine"]
    device = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
    figure.suptitle(
        f"Whole models, hidden size 512, 8 heads, float32, {device}", x=0.012, ha="left", fontsize=12, fontweight="bold"
    )
    labels = {
        label: handle for each in axes[0] for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="lower left",
        bbox_to_anchor=(0.008, 0.0),
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Draws the picture of the machine that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", help="as in the names of the result files, amd_epyc_avx2 for example")
    arguments = parser.parse_args()
    path = ROOT / "docs" / "images" / f"whole_model_{arguments.machine}.png"
    draw(arguments.machine, path)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
