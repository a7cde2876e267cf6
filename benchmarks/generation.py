"""Generation: tokens a second beside the peers, and the time of one more token at growing contexts.

    python benchmarks/generation.py                    # all four parts
    python benchmarks/generation.py --parts latency    # one of: throughput, latency, together, batch
    python benchmarks/generation.py --report           # the tables of docs/benchmarks.md, from what was measured

throughput: 1,024 tokens of prompt and 256 new ones through each package's own generate(), prompt included, batch 1.
latency: one more token after contexts of 256 to 65,536 tokens, ours and GPT-2 with its cache; all contexts take turns.
together: as latency, for one text and for 16 at a time after 1,024 tokens.
batch: as throughput, for 16 texts at a time. Results go into benchmarks/results/generation_<machine>.json; a part
found there is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from generation_peers import GENERATORS, NextTokens, build, in_silence
from machine import default_result_file, describe_machine
from timing import measure_times, seconds_of
from tqdm import tqdm
from training_peers import Sizes

PARTS = ("throughput", "latency", "together", "batch")
# GPT-2 has no more positions than it was built with; its attention over 65,536 tokens takes minutes.
GPT2_LONGEST = 16384
STEPS_A_ROUND = 8


def _is_installed(name: str) -> bool:
    package = GENERATORS[name].package
    if package == "reformer_lm":
        return True
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measure_throughput(arguments: argparse.Namespace, names: list[str], batch: int) -> dict[str, Any]:
    """Tokens a second of generate(), all contenders in rounds."""
    longest = arguments.prompt + arguments.new_tokens
    sizes = Sizes(longest, arguments.hidden_size, arguments.depth, arguments.heads, arguments.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, sizes.vocab_size, (batch, arguments.prompt), generator=generator).to(arguments.device)
    calls, counts = {}, {}
    for name in names:
        model = build(name, sizes, arguments.device, arguments.dtype)
        counts[name] = min(arguments.new_tokens, GENERATORS[name].new_tokens or arguments.new_tokens)

        def call(name: str = name, model: Any = model) -> int:
            with in_silence(), torch.no_grad():
                new = GENERATORS[name].generate(model, prompt, counts[name])
            assert new.shape == (batch, counts[name])
            return new.numel()

        calls[name] = call
    times = measure_times(calls, arguments.repetitions, arguments.device)
    for name, entry in times.items():
        entry["new_tokens"] = counts[name]
        entry["tokens_per_second"] = batch * counts[name] / entry["median_s"]
    return {"prompt": arguments.prompt, "batch": batch, "contenders": times}


def measure_latency(arguments: argparse.Namespace, cases: list[tuple[int, int]]) -> dict[str, Any]:
    """Seconds of one more token, for each contender and case; they take turns, a few tokens each.

    Args:
        arguments: the command line.
        cases: (context, texts at a time).
    """
    rounds = max(2, arguments.steps // STEPS_A_ROUND)
    room = rounds * STEPS_A_ROUND + 16
    readers: dict[tuple[str, int, int], NextTokens] = {}
    for name in ("ours", "gpt2"):
        possible = [case for case in cases if name == "ours" or case[0] <= GPT2_LONGEST]
        sizes = Sizes(
            max(possible)[0] + room, arguments.hidden_size, arguments.depth, arguments.heads, arguments.vocab_size
        )
        model = build(name, sizes, arguments.device, arguments.dtype)
        for context, batch in tqdm(possible, desc=f"{name} reads", unit="context"):
            readers[name, context, batch] = NextTokens(model, context, arguments.device, batch)
    samples: dict[tuple[str, int, int], list[float]] = {key: [] for key in readers}
    for key, reader in readers.items():
        for _ in range(4):
            reader.step()
        samples[key] = []
    for number in tqdm(range(rounds), desc="next tokens", unit="round"):
        keys = list(readers)
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            # The first step after another's turn finds that other's data in the processor's caches.
            readers[key].step()
            samples[key] += [_one_step(readers[key], arguments.device) for _ in range(STEPS_A_ROUND - 1)]
    rows = []
    for (name, context, batch), taken in samples.items():
        deciles = statistics.quantiles(taken, n=10)
        rows.append(
            {
                "contender": name,
                "context": context,
                "batch": batch,
                "median_s": statistics.median(taken),
                "tenth_s": deciles[0],
                "ninetieth_s": deciles[-1],
                "samples": len(taken),
                "cache_bytes": readers[name, context, batch].cache_bytes(),
                "seconds": taken,
            }  # fmt: skip
        )
    return {"rows": rows}


def _one_step(reader: NextTokens, device: str) -> float:
    if device == "cuda":
        # seconds_of() would take a step of its own to warm up.
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        reader.step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    return seconds_of(reader.step, device)


def report(results: dict[str, Any]) -> str:
    """Markdown: a table for each part."""
    parts = []
    for part in ("throughput", "batch"):
        if part not in results:
            continue
        measured = results[part]
        own = measured["contenders"]["ours"]["tokens_per_second"]
        spread = max(
            max(e["max_s"] - e["median_s"], e["median_s"] - e["min_s"]) / e["median_s"]
            for e in measured["contenders"].values()
        )
        samples = min(len(e["seconds"]) for e in measured["contenders"].values())
        texts = "one text" if measured["batch"] == 1 else f"{measured['batch']} texts at a time"
        lines = [
            f"generate(), {texts}, {measured['prompt']:,} tokens of prompt; median of {samples} alternating runs, none "
            f"farther than {100 * spread:.0f} % from it:\n",
            "| | new tokens | tokens/s | ours is faster by |",
            "|---|---:|---:|---:|",
        ]
        for name, entry in measured["contenders"].items():
            factor = "" if name == "ours" else f"{own / entry['tokens_per_second']:.1f}x"
            speed = entry["tokens_per_second"]
            lines.append(
                f"| {GENERATORS[name].label} | {entry['new_tokens']:,} | {speed:,.2f} | {factor} |"
                if speed < 10
                else f"| {GENERATORS[name].label} | {entry['new_tokens']:,} | {speed:,.1f} | {factor} |"
            )
        parts.append("\n".join(lines))
    if "latency" in results:
        rows = results["latency"]["rows"]
        contexts = sorted({row["context"] for row in rows})
        lines = [
            "One more token, batch 1; median (10th to 90th percentile) of "
            f"{min(row['samples'] for row in rows)} tokens, all contexts in turns:\n",
            "| context | ours | GPT-2, its cache | our cache | GPT-2's cache |",
            "|---:|---:|---:|---:|---:|",
        ]
        for context in contexts:
            cells, caches = [], []
            for name in ("ours", "gpt2"):
                found = [row for row in rows if row["contender"] == name and row["context"] == context]
                if not found:
                    cells.append("-")
                    caches.append("-")
                    continue
                (row,) = found
                low, middle, high = (1000 * row[key] for key in ("tenth_s", "median_s", "ninetieth_s"))
                cells.append(f"{middle:.1f} ms ({low:.1f} to {high:.1f})")
                caches.append(f"{row['cache_bytes'] / 2**20:,.0f} MiB")
            lines.append(f"| {context:,} | {cells[0]} | {cells[1]} | {caches[0]} | {caches[1]} |")
        parts.append("\n".join(lines))
    if "together" in results:
        rows = {(row["contender"], row["batch"]): row for row in results["together"]["rows"]}
        (single, batch) = sorted({row["batch"] for row in results["together"]["rows"]})
        context = results["together"]["rows"][0]["context"]
        lines = [
            f"One more token of each text after {context:,} tokens, one text and {batch} at a time; median of "
            f"{min(row['samples'] for row in rows.values())} steps:\n",
            f"| | one text | {batch} texts | tokens/s, one | tokens/s, {batch} | gain |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name in ("ours", "gpt2"):
            seconds = [rows[name, count]["median_s"] for count in (single, batch)]
            speeds = [count / taken for count, taken in zip((single, batch), seconds, strict=True)]
            lines.append(
                f"| {GENERATORS[name].label} | {1000 * seconds[0]:.1f} ms | {1000 * seconds[1]:.1f} ms | "
                f"{speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[1] / speeds[0]:.1f}x |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--contenders", nargs="+", default=list(GENERATORS), choices=list(GENERATORS))
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=96, help="tokens timed at each context")
    parser.add_argument("--batch", type=int, default=16, help="texts at a time in the part of that name")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=21128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="benchmarks/results/generation_<machine>.json if not given")
    parser.add_argument("--report", action="store_true", help="print the tables, measure nothing")
    arguments = parser.parse_args(argv)
    arguments.dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    arguments.out = arguments.out or default_result_file("generation", arguments.device)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing in the result file, or prints what is there."""
    arguments = parse_arguments(argv)
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.report:
        print(report(results))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch finds no CUDA device here; measure with --device cpu")
    names = [name for name in arguments.contenders if _is_installed(name)]
    for part in arguments.parts:
        if part in results:
            continue
        if part == "throughput":
            measured = measure_throughput(arguments, names, 1)
        elif part == "batch":
            measured = measure_throughput(
                arguments, [name for name in names if name in ("ours", "gpt2")], arguments.batch
            )
        elif part == "together":
            measured = measure_latency(arguments, [(arguments.prompt, 1), (arguments.prompt, arguments.batch)])
        else:
            measured = measure_latency(arguments, [(context, 1) for context in arguments.contexts])
        machine = describe_machine()
        measured |= {"commit": machine["commit"], "date": machine["date"]}
        model = {name: getattr(arguments, name) for name in ("hidden_size", "depth", "heads", "vocab_size")}
        results |= {"machine": machine, "device": arguments.device, "dtype": str(arguments.dtype), "model": model}
        results[part] = measured
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(arguments.out)
        print(report({part: measured}), flush=True)


if __name__ == "__main__":
    main()
