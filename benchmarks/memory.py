"""Peak memory of one training step, above the built model: ours beside its peers.

    python benchmarks/memory.py                          # 4,096 tokens at depth 6 and 24; 16,384 and 65,536 at depth 6
    python benchmarks/memory.py --tokens 4096 --depths 6 # one of these groups
    python benchmarks/memory.py --report                 # the tables of docs/benchmarks.md, from what was measured

Each measurement has a process of its own: the model is built, one step at 256 tokens loads the libraries, then one step
(forward, backward, and with --update AdamW's) is watched. Its peak counts gradients and, with --update, the optimizer's
state, since a machine must have room for them. Results go into benchmarks/results/memory_<machine>.json at once; what
is found there is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, default_result_file, describe_machine
from process_memory import OUT_OF_MEMORY, in_short, kibibytes, limit_to_what_is_free, reset_peak
from training_peers import CONTENDERS, Sizes, Trainee

WARM_UP_TOKENS = 256
METHOD = {
    "cpu": "Peak of the resident memory (VmHWM, reset through /proc/self/clear_refs) during one step, less what was "
    "resident before: the built model, and the libraries after one step at 256 tokens.",
    "cuda": "torch.cuda.max_memory_allocated during one step, after one at 256 tokens, less what stood before.",
}


def measure_here(name: str, sizes: Sizes, device: str, bf16: bool, update: bool) -> dict[str, Any]:
    """Peak memory of one step above the built model, in a process that does nothing else.

    Returns:
        "bytes", "resident_bytes" (the process's peak, libraries included), the sizes of parameters, and the loss; or
        "out_of_memory" with what was tried.
    """
    trainee = Trainee(name, sizes, device, bf16)
    trainee.step(WARM_UP_TOKENS)
    gc.collect()
    parameters = sum(p.numel() * p.element_size() for p in trainee.model.parameters())
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = trainee.step(update=update)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            limit_to_what_is_free()
            if not reset_peak():
                raise SystemExit("error: /proc/self/clear_refs cannot be written here, so no peak can be measured")
            before = 1024 * kibibytes("/proc/self/status", "VmRSS")
            loss = trainee.step(update=update)
            peak = 1024 * kibibytes("/proc/self/status", "VmHWM")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        return {"out_of_memory": in_short(error)}
    return {"bytes": peak - before, "resident_bytes": peak, "parameter_bytes": parameters, "loss": loss}


def measure(name: str, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure_here` in fresh processes, as often as asked for."""
    order = json.dumps([name, sizes, arguments.device, arguments.bf16, arguments.update, torch.get_num_threads()])
    samples = []
    for _ in range(arguments.repetitions):
        process = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--one", order], cwd=ROOT, capture_output=True, text=True
        )
        if process.returncode == 0:
            samples.append(json.loads(process.stdout.splitlines()[-1]))
        elif process.returncode == -9 or OUT_OF_MEMORY.search(process.stderr):
            # Not every allocation is made where an exception could be raised.
            samples.append({"out_of_memory": "the process ended"})
        else:
            raise SystemExit(f"error: memory of {name} could not be measured:\n{process.stderr}")
        if "out_of_memory" in samples[-1]:
            return samples[-1]
    taken = [sample["bytes"] for sample in samples]
    return {**samples[0], "bytes": statistics.median(taken), "samples": taken}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two measurements the same."""
    return tuple(row[name] for name in ("contender", *Sizes._fields, "bf16", "update"))


def report(results: dict[str, Any]) -> str:
    """Markdown: one table per length and kind of step, one row per contender, one column per depth."""
    parts = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["tokens"], row["bf16"], row["update"], row["hidden_size"]), []).append(row)
    for (tokens, bf16, update, width), rows in sorted(groups.items()):
        depths = sorted({row["depth"] for row in rows})
        kind = ("bf16 autocast, " if bf16 else "") + ("with AdamW" if update else "forward and backward")
        lines = [
            f"{tokens:,} tokens, hidden size {width}, {kind}; MiB above the built model:\n",
            "| | " + " | ".join(f"depth {depth}" for depth in depths) + " |",
            "|---|" + "---:|" * len(depths),
        ]
        for name, contender in CONTENDERS.items():
            cells = []
            for depth in depths:
                found = [row for row in rows if row["contender"] == name and row["depth"] == depth]
                if not found:
                    cells.append("-")
                else:
                    cells.append(f"{found[0]['bytes'] / 2**20:,.0f}" if "bytes" in found[0] else "out of memory")
            if set(cells) != {"-"}:
                lines.append(f"| {contender.label} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", nargs="+", type=int, help="4,096 (depth 6 and 24), 16,384 and 65,536 (depth 6)")
    parser.add_argument("--depths", nargs="+", type=int, default=[6])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=21128)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--update", action="store_true", help="AdamW's part too")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="benchmarks/results/memory_<machine>.json if not given")
    parser.add_argument("--report", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or default_result_file("memory", arguments.device)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing in the result file, or prints what is there."""
    arguments = parse_arguments(argv)
    if arguments.one:
        name, sizes, device, bf16, update, threads = json.loads(arguments.one)
        torch.set_num_threads(threads)
        print(json.dumps(measure_here(name, Sizes(*sizes), device, bf16, update)))
        return
    found = {"rows": []}
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.report:
        print(report(found))
        return
    pairs = [(tokens, depth) for tokens in arguments.tokens or () for depth in arguments.depths]
    pairs = pairs or [(4096, 6), (4096, 24), (16384, 6), (65536, 6)]
    done = {identity(row) for row in found["rows"]}
    for tokens, depth in pairs:
        sizes = Sizes(tokens, arguments.hidden_size, depth, arguments.heads, arguments.vocab_size)
        for name in arguments.contenders:
            row = {"contender": name, **sizes._asdict(), "bf16": arguments.bf16, "update": arguments.update}
            if identity(row) in done:
                continue
            row |= measure(name, sizes, arguments)
            shown = f"{row['bytes'] / 2**20:,.0f} MiB" if "bytes" in row else f"out of memory: {row['out_of_memory']}"
            print(f"{tokens:,} tokens, depth {depth}, {CONTENDERS[name].label}: {shown}", flush=True)
            machine = describe_machine()
            row |= {"commit": machine["commit"], "date": machine["date"]}
            found |= {"machine": machine, "device": arguments.device, "method": METHOD[arguments.device]}
            found["rows"].append(row)
            partial = arguments.out.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(arguments.out)


if __name__ == "__main__":
    main()
