r"""The time of one training step, forward, backward and AdamW: ours beside its peers.

    python benchmarks/train_step.py --lengths 4096
    python benchmarks/train_step.py --lengths 16384 --contenders ours gpt2 --repetitions 3
    python benchmarks/train_step.py --lengths 65536 --repetitions 1 --contenders ours gpt2_lean --short_warm_up
    python benchmarks/train_step.py --lengths 4096 --hidden_size 256 --depth 3 --heads 4 --vocab_size 7254 \
        --contenders ours compiled gpt2 gpt2_compiled    # is --compile worth it
    python benchmarks/train_step.py --report             # the tables of docs/benchmarks.md, from what was measured

All contenders of a length are in one process and are called in rounds, in rotating order. "_bf16" behind a contender's
name means bfloat16 autocast. Results go into benchmarks/results/train_step_<machine>.json; a length found there is not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import default_result_file, describe_machine
from timing import measure_times
from training_peers import CONTENDERS, Sizes, Trainee

BF16 = "_bf16"
DEFAULT = ["ours", "ours" + BF16, "keep_attention", "off", "reformer_pytorch", "gpt2", "gpt2_checkpointing"]


def label_of(name: str) -> str:
    """A contender's name in tables."""
    label = CONTENDERS[name.removesuffix(BF16)].label
    return f"{label}, bf16 autocast" if name.endswith(BF16) else label


def measure_group(
    sizes: Sizes, names: list[str], device: str, repetitions: int, short_warm_up: bool = False
) -> dict[str, Any]:
    """All contenders of one size; with ``short_warm_up`` the step that does not count has 256 tokens."""
    trainees = {name: Trainee(name.removesuffix(BF16), sizes, device, name.endswith(BF16)) for name in names}
    calls = {name: lambda trainee=trainee: trainee.step(update=True) for name, trainee in trainees.items()}
    warm_ups = None
    if short_warm_up:
        warm_ups = {name: lambda trainee=trainee: trainee.step(256, update=True) for name, trainee in trainees.items()}
    machine = describe_machine()
    return {
        **sizes._asdict(), "commit": machine["commit"], "date": machine["date"], "short_warm_up": short_warm_up,
        "contenders": measure_times(calls, repetitions, device, warm_ups),
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Markdown: one table per size."""
    parts = []
    for group in sorted(results["groups"], key=lambda group: (group["hidden_size"], group["depth"], group["tokens"])):
        entries = group["contenders"]
        own = entries["ours"]["median_s"] if "ours" in entries else None
        samples = min(len(entry["seconds"]) for entry in entries.values())
        spread = max(
            max(e["max_s"] - e["median_s"], e["median_s"] - e["min_s"]) / e["median_s"] for e in entries.values()
        )
        lines = [
            f"{group['tokens']:,} tokens, hidden size {group['hidden_size']}, depth {group['depth']}; median of "
            f"{samples} alternating steps, none farther than {100 * spread:.0f} % from it:\n",
            "| | step | tokens/s | against ours |",
            "|---|---:|---:|---:|",
        ]
        for name, entry in entries.items():
            against = "" if own is None or name == "ours" else f"{entry['median_s'] / own:.2f}x"
            speed = group["tokens"] / entry["median_s"]
            lines.append(f"| {label_of(name)} | {entry['median_s']:.2f} s | {speed:,.0f} | {against} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing in the result file, or prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=21128)
    every = [name + suffix for name in CONTENDERS for suffix in ("", BF16)]
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=every, metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--short_warm_up", action="store_true", help="for steps of many minutes: warm up at 256 tokens")
    parser.add_argument("--out", type=Path, help="benchmarks/results/train_step_<machine>.json if not given")
    parser.add_argument("--report", action="store_true", help="print the tables, measure nothing")
    arguments = parser.parse_args(argv)
    out = arguments.out or default_result_file("train_step", arguments.device)
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"groups": []}
    if arguments.report:
        print(report(results))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch finds no CUDA device here; measure with --device cpu")
    for tokens in arguments.lengths:
        sizes = Sizes(tokens, arguments.hidden_size, arguments.depth, arguments.heads, arguments.vocab_size)
        if any(all(group[name] == value for name, value in sizes._asdict().items()) for group in results["groups"]):
            continue
        group = measure_group(
            sizes, arguments.contenders, arguments.device, arguments.repetitions, arguments.short_warm_up
        )
        results |= {"machine": describe_machine(), "device": arguments.device}
        results["groups"].append(group)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(out)
        print(report({"groups": [group]}), flush=True)


if __name__ == "__main__":
    main()
