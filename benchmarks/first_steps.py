"""The README's training runs, timed: `python benchmarks/first_steps.py [--novels novels_chapters.json]`.

Each job is the command a new user would type, in a process of its own, with its results in a temporary folder.
Writes benchmarks/results/first_steps.json, which the READMEs quote and a test compares them with.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from machine import ROOT, describe_machine

RESULT = ROOT / "benchmarks" / "results" / "first_steps.json"


def run_job(arguments: list[str]) -> dict[str, Any]:
    """Runs train_reformer.py and reads its report.

    Args:
        arguments: its command line, without folders.

    Returns:
        Counts, validation perplexities, seconds, tokens/s over the steps, and peak resident memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {"tokenized_data_path": "tokens", "output_dir": "model", "writer_dir": "curves"}
        flags = [word for flag, name in places.items() for word in (f"--{flag}", str(Path(folder) / name))]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "train_reformer.py", *arguments, *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        peak = PeakMemory(process.pid)
        peak.start()
        output, _ = process.communicate()
        seconds = time.perf_counter() - begin
        peak.join()
    if process.returncode:
        raise SystemExit(f"error: train_reformer.py {' '.join(arguments)} failed:\n{output}")
    articles, tokens = re.search(r"corpus: ([\d,]+) articles, ([\d,]+) tokens", output).groups()
    first, last = re.search(r"validation PPL ([\d,.]+) at first, ([\d,.]+) now", output).groups()
    steps = int(re.search(r"steps: ([\d,]+) in all", output).group(1).replace(",", ""))
    per_step = int(re.search(r"([\d,]+) tokens per step", output).group(1).replace(",", ""))
    speeds = sorted(int(value.replace(",", "")) for value in re.findall(r"([\d,]+) tokens/s", output))
    return {
        "command": " ".join(["python", "train_reformer.py", *(Path(word).name if "/" in word and "config" not in word
                             else word for word in arguments)]),
        "articles": int(articles.replace(",", "")),
        "corpus_tokens": int(tokens.replace(",", "")),
        "steps": steps,
        "tokens_per_step": per_step,
        "validation_ppl_first": float(first.replace(",", "")),
        "validation_ppl_last": float(last.replace(",", "")),
        "tokens_per_second_median": speeds[len(speeds) // 2],
        "tokens_per_second_range": [speeds[0], speeds[-1]],
        "seconds": round(seconds, 1),
        "peak_resident_mb": round(peak.bytes / 2**20),
    }  # fmt: skip


class PeakMemory(threading.Thread):
    """Watches the resident memory of a process until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.bytes = 0

    def run(self) -> None:
        """Samples ten times a second."""
        while True:
            try:
                self.bytes = max(self.bytes, self.process.memory_info().rss)
            except psutil.Error:
                return
            if self.process.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)


def main() -> None:
    """Runs the jobs and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", type=Path, help="a large corpus, JSON list of articles, for the 50-step job")
    arguments = parser.parse_args()
    common = ["--raw", "--model_config", "configs/tiny.json"]
    results = {"machine": describe_machine(), "demo": run_job([*common, "--epochs", "2"])}
    if arguments.novels:
        results["novels"] = run_job(
            [*common, "--epochs", "1", "--max_steps", "50", "--raw_data_path", str(arguments.novels)]
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
