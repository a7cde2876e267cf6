"""Memory does not grow with the corpus: two gigabytes in one file."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
GIGABYTE = 10**9
SCRIPT = """
import sys
from reformer_lm.corpus import CorpusSource, build_shards
from reformer_lm.text import load_tokenizer
if __name__ == "__main__":
    index = build_shards(CorpusSource([sys.argv[1]]), load_tokenizer(), sys.argv[2], 8, workers=int(sys.argv[3]))
    print(index.num_articles, index.num_tokens)
"""


def pieces(size: int, kind: str) -> Iterator[tuple[str, int]]:
    """Text of a JSON array or of JSON lines, up to a size in bytes, with how many articles each piece adds."""
    texts = json.loads((ROOT / "data" / "train.json").read_text(encoding="utf-8"))
    written = number = 0
    while written < size:
        # A number makes each round different, so that nothing is remembered from the last.
        articles = [f"第{number}篇{number * 7919}\n{text}" for text in texts]
        encoded = [json.dumps(article, ensure_ascii=False) for article in articles]
        text = ("" if number == 0 else ",\n") + ",\n".join(encoded) if kind == "json" else "\n".join(encoded) + "\n"
        written += len(text.encode())
        number += 1
        yield text, len(articles)


def resident(pid: int) -> int:
    """Bytes of a process in memory, those it shares with others included; 0 once it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def resident_together(pid: int) -> int:
    """Bytes in memory of a process and all that it started, what they share counted once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        # One of them has just ended.
        pass
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("workers", [1, 2])
def test_two_gigabytes_take_less_than_one_of_memory(tmp_path: Path, kind: str, workers: int) -> None:
    path = tmp_path / f"corpus.{kind}"
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if kind == "json" else "")
        for text, articles in pieces(2 * GIGABYTE, kind):
            file.write(text)
            count += articles
        file.write("]" if kind == "json" else "")
    assert path.stat().st_size >= 2 * GIGABYTE
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(path), str(tmp_path / "tokens"), str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    own = together = 0
    while process.poll() is None:
        own, together = max(own, resident(process.pid)), max(together, resident_together(process.pid))
        time.sleep(0.2)
    output, _ = process.communicate()
    assert process.returncode == 0
    found, tokens = map(int, output.split())
    assert found == count
    assert tokens > GIGABYTE // 2
    print(f"{kind}, {workers} workers: {own / 1e6:.0f} MB resident, {together / 1e6:.0f} MB with all its processes")
    assert 0 < own < GIGABYTE
    assert together < GIGABYTE
    # Two runs of this test keep 6 GB at a time otherwise.
    path.unlink()
