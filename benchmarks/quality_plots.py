"""The picture of benchmarks/quality.py for docs/benchmarks.md: learning by the clock, and perplexity by position.

    python benchmarks/quality_plots.py amd_epyc_avx2

Reads benchmarks/results/quality_<machine>.json and writes docs/images/quality_<machine>.png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import RESULTS, ROOT
from quality import LABELS, best_runs, perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart also without colours. After Okabe and Ito; the colours of the other pictures.
_LOOK: dict[str, dict[str, Any]] = {
    "ours": {"color": "#D55E00", "marker": "o", "linewidth": 2.4},
    "llama": {"color": "#009E73", "marker": "^"},
    "gpt2": {"color": "#4D4D4D", "marker": "D"},
    "reformer_pytorch": {"color": "#0072B2", "marker": "s"},
}


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_yscale("log")
    axes.grid(True, which="both", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    low, high = axes.get_ylim()
    # Over a wide range there is no room for all of them.
    labelled = "123456789" if high < 3 * low else "235"
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if str(value)[0] in labelled else "")
    axes.tick_params(which="minor", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws two panels for each window length.

    Args:
        results: content of the result file.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    contexts = sorted({entry["context"] for entry in runs})
    figure, rows = pyplot.subplots(len(contexts), 2, figsize=(10.5, 4.1 * len(contexts)), dpi=130, squeeze=False)
    for context, (left, right) in zip(contexts, rows, strict=True):
        for name, entry in best_runs(runs, context).items():
            style = {"linewidth": 1.5, "markersize": 4.5, "label": LABELS[name], **_LOOK[name]}
            # The first points are of models that have hardly begun.
            curve = entry["training_curve"][2:]
            ratio = entry["tokens_per_character"]
            left.plot([s / 60 for s, _ in curve], [math.exp(loss * ratio) for _, loss in curve], **style)
            parts = entry["loss_by_position"]
            right.plot(
                [math.sqrt(a * b) for a, b, _ in parts], [perplexity(entry, loss) for *_, loss in parts], **style
            )
        _finish(left, f"Training text, windows of {context:,} tokens", "minutes of training", "PPL per character")
        _finish(right, f"Validation text, windows of {context:,} tokens", "position in the window", "PPL per character")
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        right.legend(frameon=False, fontsize=9)
    machine, first = results["machine"], runs[0]
    device = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(
        f"{first['minutes']:g} minutes on novels, {first['depth']} layers, width {first['hidden_size']}, {device}",
        x=0.012, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Draws the picture of the machine that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", help="as in the name of the result file, amd_epyc_avx2 for example")
    arguments = parser.parse_args()
    source = RESULTS / f"quality_{arguments.machine}.json"
    if not source.exists():
        raise SystemExit(f"error: no {source.relative_to(ROOT)}; run benchmarks/quality.py first")
    path = ROOT / "docs" / "images" / f"quality_{arguments.machine}.png"
    draw(json.loads(source.read_text(encoding="utf-8")), path)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
