"""One training step on 1,048,576 tokens of a book.

    python benchmarks/million.py --book long_book.txt

The README's command, in a process of its own: step 0 validates the model on the very window that step 1 trains on, so
the two losses must agree. Time and peak memory of the whole process go into benchmarks/results/million_<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from first_steps import PeakMemory
from machine import ROOT, default_result_file, describe_machine

TOKENS = 1 << 20


def beginning_of(book: str, tokens: int) -> str:
    """The first characters of a text that make up so many tokens, the two ends of the article included."""
    from reformer_lm.text import encode_article, load_tokenizer

    tokenizer = load_tokenizer()
    low, high = 0, len(book)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode_article(tokenizer, book[:middle])) <= tokens else (low, middle - 1)
    found = len(encode_article(tokenizer, book[:low]))
    if found != tokens:
        raise SystemExit(f"error: the book has {found:,} tokens, not {tokens:,}: give a longer one")
    return book[:low]


def run(text: str, config: str) -> dict[str, Any]:
    """Trains one step with train_reformer.py.

    Args:
        text: the article that training and validation see.
        config: configuration file.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "book.json"
        corpus.write_text(json.dumps([text], ensure_ascii=False), encoding="utf-8")
        command = [
            sys.executable, "train_reformer.py", "--raw", "--model_config", config, "--max_steps", "1",
            "--raw_data_path", str(corpus), "--val_data_path", str(corpus), "--num_pieces", "1",
        ]  # fmt: skip
        for flag, name in {"tokenized_data_path": "tokens", "output_dir": "model", "writer_dir": "curves"}.items():
            command += [f"--{flag}", str(Path(folder) / name)]
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        peak = PeakMemory(process.pid)
        peak.start()
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append((time.perf_counter() - begin, line))
            if line.startswith("step 1/1"):
                # The validation that would follow takes minutes and tells nothing more.
                process.terminate()
        process.wait()
        peak.join()
    output = "".join(line for _, line in lines)
    trained = re.search(r"step 1/1  loss ([\d.]+) .* ([\d,]+) tokens/s", output)
    if trained is None:
        raise SystemExit("error: train_reformer.py ended before its step was done")
    evaluated, scored = re.search(r"step 0  validation loss ([\d.]+) .*\(([\d,]+) tokens\)", output).groups()
    began, before, after = (
        next(t for t, line in lines if line.startswith(name)) for name in ("steps: ", "step 0 ", "step 1/1")
    )
    return {
        "config": config,
        "tokens_scored": int(scored.replace(",", "")),
        "evaluation_loss": float(evaluated),
        "training_loss": float(trained.group(1)),
        "evaluation_seconds": round(before - began, 1),
        "step_seconds": round(after - before, 1),
        "tokens_per_second": int(trained.group(2).replace(",", "")),
        "peak_resident_gib": round(peak.bytes / 2**30, 2),
    }


def main() -> None:
    """Runs the command and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--book", type=Path, required=True, help="a text of a million characters")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--config", default="configs/million.json")
    parser.add_argument("--out", type=Path, default=default_result_file("million", "cpu"))
    arguments = parser.parse_args()
    text = beginning_of(arguments.book.read_text(encoding="utf-8"), arguments.tokens)
    results = {"machine": describe_machine(), **run(text, arguments.config)}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
