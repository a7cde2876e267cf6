"""Tables and pictures of what benchmarks/attention.py measured, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_profile import ALL_GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart also without colours. After Okabe and Ito.
_LOOK: dict[str, dict[str, Any]] = {
    "ours": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "markersize": 6.5, "zorder": 5},
    "reformer_pytorch": {"color": "#0072B2", "marker": "s", "linewidth": 1.5, "markersize": 5, "zorder": 4},
    "transformers": {"color": "#009E73", "marker": "^", "linewidth": 1.5, "markersize": 6, "zorder": 3},
    "sdpa": {"color": "#4D4D4D", "marker": "D", "linewidth": 1.5, "markersize": 4.5, "zorder": 4},
}
_FAINT = "#A8A8A8"
_MIB = 1 << 20


def format_seconds(value: float) -> str:
    """Three significant digits in ms or s: 0.02824 -> "28.2 ms", 104.2 -> "104 s"."""
    return f"{_three_digits(1000 * value)} ms" if value < 0.9995 else f"{_three_digits(value)} s"


def format_bytes(value: float) -> str:
    """Three significant digits in MiB or GiB."""
    mebibytes = value / _MIB
    return f"{_three_digits(mebibytes)} MiB" if mebibytes < 999.5 else f"{_three_digits(mebibytes / 1024)} GiB"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_tokens(tokens: float) -> str:
    """Ticks of the axis: 65,536 -> "64k"."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def _dtypes(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(group["dtype"] for group in results["groups"]))


def _groups(results: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    return sorted((g for g in results["groups"] if g["dtype"] == dtype), key=lambda group: group["tokens"])


def _names(results: dict[str, Any]) -> list[str]:
    """Contenders that were measured at all, ours first."""
    return [
        name
        for name in sorted(results["contenders"], key=list(_LOOK).index)
        if any("median_s" in group["contenders"].get(name, {}) for group in results["groups"])
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _comparison(results: dict[str, Any], dtype: str, field: str, show: Callable[[float], str]) -> str:
    """One row per length; beside each peer's figure how many times ours it is."""
    names = _names(results)
    rows = []
    for group in _groups(results, dtype):
        own = group["contenders"].get("ours", {}).get(field)
        row = [f"{group['tokens']:,}"]
        for name in names:
            value = group["contenders"].get(name, {}).get(field)
            if value is None:
                row.append("-")
            elif name == "ours":
                row.append(f"**{show(value)}**")
            else:
                row.append(f"{show(value)} ({_factor(value / own)})" if own else show(value))
        rows.append(row)
    return _table(["tokens", *(results["contenders"][name]["label"] for name in names)], rows)


def _factor(value: float) -> str:
    """Two digits that count: 0.37x, 3.8x, 24x."""
    if value >= 9.95:
        return f"{value:,.0f}x"
    return f"{value:.1f}x" if value >= 0.995 else f"{value:.2f}x"


def _not_run(results: dict[str, Any], dtype: str) -> list[str]:
    """For each contender that does not reach the end, from where and why."""
    lines = []
    for name, about in results["contenders"].items():
        for group in _groups(results, dtype):
            entry = group["contenders"].get(name, {})
            if "not_run" in entry:
                lines.append(f"- {about['label']}, {group['tokens']:,} tokens and more: {entry['not_run']}.")
                break
    return lines


def _spread(results: dict[str, Any], dtype: str) -> float:
    """The farthest that a sample lies from its median, as a share of it."""
    entries = [e for g in _groups(results, dtype) for e in g["contenders"].values() if "median_s" in e]
    return max(max(e["max_s"] - e["median_s"], e["median_s"] - e["min_s"]) / e["median_s"] for e in entries)


def best_ceiling(results: dict[str, Any], dtype: str) -> float:
    """GFLOP/s of the fastest matrix product among all groups of a type."""
    return max(group["ceiling"]["best_gflops"] for group in _groups(results, dtype))


def _ceiling_table(results: dict[str, Any], dtype: str) -> str:
    ceiling = best_ceiling(results, dtype)
    rows = []
    for group in _groups(results, dtype):
        seconds = group["contenders"].get("ours", {}).get("median_s")
        if seconds is not None:
            operations = sum(group["useful_operations"].values())
            speed = operations / seconds / 1e9
            rows.append(
                [f"{group['tokens']:,}", f"{operations / 1e9:,.1f}", f"{speed:,.1f}", f"{100 * speed / ceiling:.0f} %"]
            )
    return _table(["tokens", "useful GFLOP", "GFLOP/s", "of the ceiling"], rows)


def _profile_table(results: dict[str, Any], dtype: str) -> str:
    profiles = sorted((p for p in results["profiles"] if p["dtype"] == dtype), key=lambda profile: profile["tokens"])
    if not profiles:
        return ""
    rows = []
    for name in ALL_GROUPS:
        row = [name]
        for profile in profiles:
            found = profile["groups"][name]
            row.append(f"{format_seconds(found['seconds'])} ({100 * found['share']:.0f} %)")
        rows.append(row)
    table = _table(["own time", *(f"{profile['tokens']:,} tokens" for profile in profiles)], rows)
    rest = sorted({name for profile in profiles for name in profile["rest"]})
    return table + (f'\n\nIn "rest": {", ".join(f"`{name}`" for name in rest)}.' if rest else "")


def report(results: dict[str, Any]) -> str:
    """The Markdown tables of one result file.

    Args:
        results: as benchmarks/attention.py writes them.

    Returns:
        For each type: times, memory, share of the matrix-multiplication ceiling, profile.
    """
    machine, settings = results["machine"], results["settings"]
    versions = machine["versions"]
    parts = [
        f"{_hardware(results)}; torch {versions['torch']}, transformers {versions['transformers']}, reformer-pytorch "
        f"{versions['reformer-pytorch']}; commit {machine['commit']}, {machine['date']}. One call, forward and "
        f"backward: batch {settings['batch']}, {settings['heads']} heads of {settings['head_dim']}, "
        f"{settings['hashes']} hashes, buckets of {settings['bucket_size']} tokens. In brackets: as a multiple of ours."
    ]
    for dtype in _dtypes(results):
        samples = min(
            len(e["seconds"]) for g in _groups(results, dtype) for e in g["contenders"].values() if "seconds" in e
        )
        parts += [
            f"### {dtype}: time",
            f"Median of {samples} alternating calls; no sample lies farther than {100 * _spread(results, dtype):.0f} % "
            "from its median.",
            _comparison(results, dtype, "median_s", format_seconds),
        ]
        if reasons := _not_run(results, dtype):
            parts.append("Not run:\n\n" + "\n".join(reasons))
        if any(e.get("memory_median_bytes") for g in _groups(results, dtype) for e in g["contenders"].values()):
            parts += [
                f"### {dtype}: peak memory above what stood before the call",
                _comparison(results, dtype, "memory_median_bytes", format_bytes),
            ]
        parts += [
            f"### {dtype}: share of the matrix-multiplication ceiling, {best_ceiling(results, dtype):,.0f} GFLOP/s",
            _ceiling_table(results, dtype),
        ]
        if profile := _profile_table(results, dtype):
            parts += [f"### {dtype}: what the time of our call goes into", profile]
    return "\n\n".join(parts)


def draw(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draws time and memory against length, one picture per type.

    Args:
        results: as benchmarks/attention.py writes them.
        folder: where <name>_<type>.png goes; made if need be.
        name: of the result file, without its ending.

    Returns:
        The pictures' paths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    settings = results["settings"]
    paths = []
    for dtype in _dtypes(results):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 5.2), dpi=150)
        _draw_panel(left, results, dtype, _times, base=10)
        left.set_title("Time of one call, forward + backward", fontsize=11, loc="left")
        left.yaxis.set_major_formatter(lambda value, _: _tick_seconds(value))
        left.set_ylabel("time")
        _draw_panel(right, results, dtype, _memory, base=2)
        right.set_title("Peak memory of one call, above what stood before it", fontsize=11, loc="left")
        right.yaxis.set_major_formatter(lambda value, _: _tick_mebibytes(value))
        right.set_ylabel("memory")
        title = (
            f"Causal attention, {settings['heads']} heads of {settings['head_dim']}, batch {settings['batch']}, {dtype}"
        )
        figure.suptitle(f"{title}, {_hardware(results)}", x=0.012, y=0.982, ha="left", fontsize=12.5, fontweight="bold")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.005, 0.945), ncols=len(labels), frameon=False,
            fontsize=10, columnspacing=2.2,
        )  # fmt: skip
        figure.text(0.988, 0.012, "medians; bars: least and largest sample", ha="right", fontsize=8.5, color="#707070")
        figure.tight_layout(rect=(0, 0.02, 1, 0.875 if any("\n" in label for label in labels) else 0.91), w_pad=2.5)
        paths.append(folder / f"{name}_{dtype}.png")
        figure.savefig(paths[-1])
        pyplot.close(figure)
    return paths


def _hardware(results: dict[str, Any]) -> str:
    machine = results["machine"]
    if results["device"] == "cuda":
        return machine["gpu"]
    threads = machine["threads"]
    return f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}"


def _times(entry: dict[str, Any]) -> tuple[float, float, float] | None:
    return (entry["median_s"], entry["min_s"], entry["max_s"]) if "median_s" in entry else None


def _memory(entry: dict[str, Any]) -> tuple[float, float, float] | None:
    # A logarithmic axis has no zero: less than 0.1 MiB is drawn as 0.1 MiB.
    shown = [max(0.1, value / _MIB) for value in entry.get("memory_bytes") or ()]
    return (max(0.1, entry["memory_median_bytes"] / _MIB), min(shown), max(shown)) if shown else None


def _tick_seconds(value: float) -> str:
    return f"{1000 * value:g} ms" if value < 1 else f"{value:g} s"


def _tick_mebibytes(value: float) -> str:
    return f"{value:g} MiB" if value < 1024 else f"{value / 1024:g} GiB"


def _legend_label(results: dict[str, Any], dtype: str, name: str) -> str:
    """The contender's name and, where its line ends early, why."""
    label = results["contenders"][name]["label"]
    groups = _groups(results, dtype)
    last = max((g["tokens"] for g in groups if "median_s" in g["contenders"].get(name, {})), default=0)
    beyond = [g["contenders"].get(name, {}).get("cause") for g in groups if g["tokens"] > last]
    if not last or not beyond:
        return label
    why = {"memory": "out of memory beyond", "time": "too slow beyond"}.get(beyond[0], "measured to")
    return f"{label}\n({why} {format_tokens(last)})"


def _draw_panel(
    axes: Axes,
    results: dict[str, Any],
    dtype: str,
    pick: Callable[[dict[str, Any]], tuple[float, float, float] | None],
    base: float,
) -> None:
    """One quantity against length for all contenders, with a key of linear and quadratic growth."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    groups = _groups(results, dtype)
    lengths = [group["tokens"] for group in groups]
    everything: list[float] = []
    for name in _names(results):
        points = [(group["tokens"], pick(group["contenders"].get(name, {}))) for group in groups]
        drawn = [(tokens, point) for tokens, point in points if point is not None]
        if not drawn:
            continue
        middle, least, largest = zip(*(point for _, point in drawn), strict=True)
        bars = [
            [m - low for m, low in zip(middle, least, strict=True)],
            [high - m for m, high in zip(middle, largest, strict=True)],
        ]
        label = _legend_label(results, dtype, name)
        axes.errorbar([tokens for tokens, _ in drawn], middle, yerr=bars, label=label, capsize=2.5, **_LOOK[name])
        everything += [*least, *largest]
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    axes.set_xticks(lengths, [format_tokens(tokens) for tokens in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not everything:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#707070")
        return
    axes.set_ylim(min(everything) / 2.2, max(everything) * 1.7)
    if base == 2:
        # Every fourfold; with all doublings the labels would crowd.
        axes.yaxis.set_major_locator(LogLocator(base=4, numticks=20))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    _draw_growth(axes)


def _draw_growth(axes: Axes) -> None:
    """What linear and quadratic growth look like here, faint in the lower right corner, where no curve comes."""
    left, right = axes.get_xlim()
    begin, end = (left * (right / left) ** share for share in (0.56, 0.84))
    low = 1.35 * axes.get_ylim()[0]
    for power, label in ((1, "linear"), (2, "quadratic")):
        top = low * (end / begin) ** power
        axes.plot([begin, end], [low, top], color=_FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            label, (end, top), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color="#8A8A8A",
            style="italic",
        )  # fmt: skip
