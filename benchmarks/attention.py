"""One LSH attention call of ours beside its peers, forward and backward: time, memory, and what the time goes into.

    python benchmarks/attention.py                       # on the CPU, 1,024 to 65,536 tokens
    python benchmarks/attention.py --device cuda         # to 262,144 tokens
    python benchmarks/attention.py --report              # the tables of docs/benchmarks.md, from what was measured
    python benchmarks/attention.py --plot                # its pictures, into docs/images

Who stands beside whom, and that all do the same work: benchmarks/attention_peers.py. For each type and length, memory
comes first: on the CPU in a process of its own per call, so that a contender that needs too much is found out without
harm. Then all contenders are timed in one process, in rounds: each round calls every contender once, in rotating order,
so that whatever else slows the machine down for a while slows all of them. Every finished group goes into
benchmarks/results/attention_<machine>.json at once (a file per processor or GPU), and groups found there are not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from attention_memory import METHOD, measure_memory
from attention_peers import (
    BUCKET_SIZE,
    CONTENDERS,
    DTYPES,
    HASHES,
    HEAD_DIM,
    HEADS,
    LENGTH_MULTIPLE,
    make_inputs,
    why_missing,
)
from attention_profile import measure_ceiling, profile_ours, useful_operations
from machine import ROOT, default_result_file, describe_machine
from timing import measure_times


def why_not(
    name: str, tokens: int, dtype: str, groups: list[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, str] | None:
    """Why a contender is not run at a length: missing, not asked for, too slow or too large at a shorter one.

    Returns:
        None if it is run, else "not_run" (the reason in words) and "cause" (missing, asked, memory or time).
    """
    if reason := why_missing(name):
        return {"not_run": reason, "cause": "missing"}
    if tokens > arguments.longest.get(name, tokens):
        return {"not_run": f"not asked for beyond {arguments.longest[name]:,} tokens", "cause": "asked"}
    for group in sorted(groups, key=lambda group: group["tokens"]):
        entry = group["contenders"].get(name, {})
        if group["dtype"] != dtype or group["tokens"] >= tokens:
            continue
        if entry.get("cause") == "memory":
            return {"not_run": f"out of memory at {group['tokens']:,} tokens", "cause": "memory"}
        if entry.get("min_s", 0.0) > arguments.call_limit_s:
            took = f"one call took {entry['min_s']:.0f} s at {group['tokens']:,} tokens"
            return {"not_run": f"{took}, over the limit of {arguments.call_limit_s:g} s", "cause": "time"}
    return None


def measure_group(
    tokens: int, dtype: str, groups: list[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everything about one type and length: the ceiling, memory and times of all contenders."""
    device = arguments.device
    contenders: dict[str, dict[str, Any]] = {}
    for name in arguments.contenders:
        contenders[name] = why_not(name, tokens, dtype, groups, arguments) or measure_memory(
            name, tokens, dtype, device, arguments.memory_repetitions
        )
        if "not_run" in contenders[name]:
            print(f"  {CONTENDERS[name].label}: skipped, {contenders[name]['not_run']}", flush=True)
    ceiling = measure_ceiling(arguments.ceiling_size, DTYPES[dtype], device)
    inputs = make_inputs(tokens, DTYPES[dtype], device)
    calls = {name: CONTENDERS[name].build(inputs) for name, entry in contenders.items() if "not_run" not in entry}
    for name, times in measure_times(calls, arguments.repetitions, device).items() if calls else ():
        contenders[name].update(times)
        print(f"  {CONTENDERS[name].label}: {times['median_s']:.4g} s", flush=True)
    machine = describe_machine()
    return {
        "dtype": dtype,
        "tokens": tokens,
        "date": machine["date"],
        "commit": machine["commit"],
        "useful_operations": useful_operations(tokens),
        "ceiling": ceiling,
        "contenders": contenders,
    }


def load(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, or an empty result.

    Raises:
        SystemExit: it was measured on another machine or with other versions.
    """
    if not path.exists():
        return {"groups": [], "profiles": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("processor", "cores", "threads", "gpu", "python", "versions"):
        if found["machine"][name] != machine[name]:
            raise SystemExit(
                f"error: {path} was measured with another {name} ({found['machine'][name]}, here {machine[name]}), and "
                "figures of two set-ups do not belong in one table: give another --out, or remove the file"
            )
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the result file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def measure(arguments: argparse.Namespace) -> None:
    """Measures what is missing in the result file."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch finds no CUDA device here; measure with --device cpu")
    machine = describe_machine()
    results = load(arguments.out, machine)
    if arguments.fresh:
        # Only what is about to be measured again.
        for kind in ("groups", "profiles"):
            results[kind] = [
                entry
                for entry in results[kind]
                if entry["dtype"] not in arguments.dtypes or entry["tokens"] not in arguments.lengths
            ]
    results["machine"] = machine
    results["device"] = arguments.device
    results["settings"] = {
        "batch": 1,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "hashes": HASHES,
        "bucket_size": BUCKET_SIZE,
        "repetitions": arguments.repetitions,
        "memory_repetitions": arguments.memory_repetitions,
        "call_limit_s": arguments.call_limit_s,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "memory": METHOD[arguments.device],
    }
    results["contenders"] = results.get("contenders", {}) | {
        name: {"label": CONTENDERS[name].label, "work": CONTENDERS[name].work, "missing": why_missing(name)}
        for name in arguments.contenders
    }
    groups, profiles = results["groups"], results["profiles"]
    for dtype in arguments.dtypes:
        for tokens in sorted(arguments.lengths):
            group = _find(groups, dtype, tokens)
            if group is None:
                print(f"{dtype}, {tokens:,} tokens", flush=True)
                group = measure_group(tokens, dtype, groups, arguments)
                groups.append(group)
                save(arguments.out, results)
            ran = "seconds" in group["contenders"].get("ours", {})
            if ran and tokens in arguments.profile_lengths and _find(profiles, dtype, tokens) is None:
                profile = profile_ours(tokens, DTYPES[dtype], arguments.device)
                profiles.append({"dtype": dtype, "tokens": tokens, **profile})
                save(arguments.out, results)


def _find(items: list[dict[str, Any]], dtype: str, tokens: int) -> dict[str, Any] | None:
    return next((item for item in items if (item["dtype"], item["tokens"]) == (dtype, tokens)), None)


def _longest(text: str) -> tuple[str, int]:
    name, _, length = text.partition("=")
    if name not in CONTENDERS or not length.isdecimal():
        raise argparse.ArgumentTypeError(f"expected NAME=TOKENS with a name of {', '.join(CONTENDERS)}, got {text!r}")
    return name, int(length)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", nargs="+", type=int, help="1,024 to 65,536 (CUDA: 262,144), doubling")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--longest", nargs="+", type=_longest, default=[], metavar="NAME=TOKENS")
    parser.add_argument(
        "--call_limit_s", type=float, default=60.0, help="who takes longer is not run at longer lengths"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory_repetitions", type=int, default=3, help="0: memory is not measured")
    parser.add_argument("--profile_lengths", nargs="*", type=int, default=[4096, 65536])
    parser.add_argument("--ceiling_size", type=int, help="n of the n x n matrix product; 4,096 (CUDA: 16,384)")
    parser.add_argument("--threads", type=int, help="torch's default if not given")
    parser.add_argument("--fresh", action="store_true", help="measure the asked types and lengths again")
    parser.add_argument("--out", type=Path, help="benchmarks/results/attention_<machine>.json if not given")
    parser.add_argument("--report", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw the pictures, measure nothing")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="where --plot saves")
    arguments = parser.parse_args(argv)
    on_cuda = arguments.device == "cuda"
    arguments.lengths = arguments.lengths or [2**power for power in range(10, 19 if on_cuda else 17)]
    if wrong := [length for length in arguments.lengths if length < 1 or length % LENGTH_MULTIPLE]:
        parser.error(f"--lengths must be multiples of {LENGTH_MULTIPLE} (reformer-pytorch needs that), got {wrong}")
    if arguments.repetitions < 1 or arguments.memory_repetitions < 0:
        parser.error("--repetitions must be at least 1 and --memory_repetitions at least 0")
    arguments.longest = dict(arguments.longest)
    arguments.ceiling_size = arguments.ceiling_size or (16384 if on_cuda else 4096)
    arguments.out = arguments.out or default_result_file("attention", arguments.device)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures, or prints or draws what was measured."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not (arguments.report or arguments.plot):
        measure(arguments)
        return
    # Drawing needs matplotlib, measuring does not.
    from attention_plots import draw, report

    results = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.report:
        print(report(results))
    if arguments.plot:
        for path in draw(results, arguments.images, arguments.out.stem):
            print(path)


if __name__ == "__main__":
    main()
