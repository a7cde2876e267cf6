"""Which optimizer learns novels fastest by the clock.

    python benchmarks/optimizers.py --train novels_chapters.json --validation novels_val.json --steps 240
    python benchmarks/optimizers.py --train ... --validation ... --optimizers muon --steps 200   # as long
    python benchmarks/optimizers.py --report             # the table of docs/benchmarks.md, from what was measured

Each run is train_reformer.py with configs/tiny.json at 1,024 tokens, in a process of its own, one after the other. The
clock counts steps only, not validations. An optimizer whose steps take longer is given fewer, so that its schedule ends
at the same time. Results go into benchmarks/results/optimizers_<machine>.json; a run found there is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import ROOT, default_result_file, describe_machine

TOKENS = 1024


def run(train: Path, validation: Path, optimizer: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Trains once; the validation losses with the seconds of training before each."""
    config = json.loads((ROOT / "configs" / "tiny.json").read_text(encoding="utf-8"))
    config["model"]["max_position_embeddings"] = TOKENS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        options = {
            "model_config": path, "raw_data_path": train, "val_data_path": validation, "optimizer": optimizer,
            "lr": rate, "max_steps": steps, "epochs": 100, "batch_size": 2, "stride": TOKENS, "seed": seed,
            "eval_every": steps, "sample_every": 0, "log_step": 10,
            "tokenized_data_path": folder / "tokens", "output_dir": folder / "model", "writer_dir": folder / "curves",
        }  # fmt: skip
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "train_reformer.py", "--raw", "--quiet", *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (folder / "model" / "metrics.jsonl").read_text("utf-8").splitlines()]
    seconds = {line["step"]: line["train/seconds"] for line in lines if "train/seconds" in line} | {0: 0.0}
    points = [
        {"step": line["step"], "seconds": seconds[line["step"]], "loss": line["validation/loss"]}
        for line in lines
        if "validation/loss" in line
    ]
    return {"optimizer": optimizer, "lr": rate, "steps": steps, "seed": seed, "points": points}


def report(results: dict[str, Any]) -> str:
    """Markdown: one row for each run, the best first."""
    lines = [
        "| optimizer | learning rate | steps | seconds a step | seconds of training | nats per token at the end |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in sorted(results["runs"], key=lambda entry: entry["points"][-1]["loss"]):
        last = entry["points"][-1]
        each = last["seconds"] / last["step"]
        lines.append(
            f"| {entry['optimizer']} | {entry['lr']:g} | {entry['steps']} | {each:.3f} | {last['seconds']:.0f} | "
            f"{last['loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, help="a JSON list of articles")
    parser.add_argument("--validation", type=Path, help="another one")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=default_result_file("optimizers", "cpu"))
    parser.add_argument("--report", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"runs": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.report:
        print(report(results))
        return
    if arguments.train is None or arguments.validation is None:
        raise SystemExit("error: give the texts with --train and --validation")
    found = {(entry["optimizer"], entry["lr"], entry["seed"], entry["steps"]) for entry in results["runs"]}
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for optimizer in arguments.optimizers:
                if (optimizer, rate, seed, arguments.steps) in found:
                    continue
                entry = run(
                    arguments.train.resolve(), arguments.validation.resolve(), optimizer, rate, arguments.steps, seed
                )
                results["runs"].append(entry)
                content = {"machine": describe_machine(), "tokens": TOKENS, **results}
                arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                print(optimizer, rate, seed, entry["points"][-1], flush=True)
    print(report(results))


if __name__ == "__main__":
    main()
