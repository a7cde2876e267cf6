"""Tokenising a corpus on one core: from a JSON file of articles to token ids on disk.

    python benchmarks/tokenisation.py --corpus novels_chapters.json
    python benchmarks/tokenisation.py --report           # the table of docs/benchmarks.md, from what was measured

ours: `build_shards` in one process, all of it: checksum of the file, incremental reading, tokens, hashes, shards.
tokenizer: the file read at once, the same tokenizer called for a batch of all articles, ids written as uint16.
gpt2_chinese: what its train.py does with --raw, through a BERT tokenizer in Python as transformers had it (rebuilt
below): the file read at once, newlines made [SEP], each article tokenised and converted, ids written as text.

All in one process pinned to one core, in alternation. Results go into benchmarks/results/tokenisation_<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before the tokenizer starts its threads.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import torch
from machine import default_result_file, describe_machine
from timing import measure_times

from reformer_lm.corpus import CorpusSource, build_shards
from reformer_lm.text import DEFAULT_VOCABULARY, encode_articles, load_tokenizer

LABELS = {
    "ours": "ours (`build_shards`)",
    "tokenizer": "the same tokenizer (Rust), called for whole articles",
    "gpt2_chinese": "GPT2-Chinese's way (BERT tokenizer in Python)",
}
NUM_PIECES = 8
HANZI = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
         (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))  # fmt: skip


class PythonBertTokenizer:
    """BERT's tokenisation as libraries did it in Python: character by character, then WordPiece word by word.

    Args:
        vocabulary: tokens in the order of their ids.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {token: number for number, token in enumerate(vocabulary)}
        self.kept = {"[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"}

    def tokenize(self, text: str) -> list[str]:
        """A text's tokens."""
        tokens = []
        for word in self._words(text):
            tokens += [word] if word in self.kept else self._pieces(word)
        return tokens

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """The tokens' ids."""
        return [self.ids.get(token, self.ids["[UNK]"]) for token in tokens]

    def _words(self, text: str) -> list[str]:
        words = []
        for word in self._spaced(self._cleaned(text)).split():
            if word in self.kept:
                words.append(word)
                continue
            bare = [c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn"]
            words += self._split_at_punctuation("".join(bare))
        return " ".join(words).split()

    @staticmethod
    def _cleaned(text: str) -> str:
        output = []
        for character in text:
            code = ord(character)
            if code == 0 or code == 0xFFFD or is_control(character):
                continue
            output.append(" " if is_white_space(character) else character)
        return "".join(output)

    @staticmethod
    def _spaced(text: str) -> str:
        output = []
        for character in text:
            if is_hanzi(ord(character)):
                output += [" ", character, " "]
            else:
                output.append(character)
        return "".join(output)

    def _split_at_punctuation(self, word: str) -> list[str]:
        parts: list[list[str]] = []
        begins = True
        for character in word:
            if is_punctuation(character):
                parts.append([character])
                begins = True
            else:
                if begins:
                    parts.append([])
                begins = False
                parts[-1].append(character)
        return ["".join(part) for part in parts]

    def _pieces(self, word: str) -> list[str]:
        characters = list(word)
        if len(characters) > 100:
            return ["[UNK]"]
        pieces = []
        start = 0
        while start < len(characters):
            end = len(characters)
            found = None
            while start < end:
                piece = "".join(characters[start:end])
                if start > 0:
                    piece = "##" + piece
                if piece in self.ids:
                    found = piece
                    break
                end -= 1
            if found is None:
                return ["[UNK]"]
            pieces.append(found)
            start = end
        return pieces


def is_white_space(character: str) -> bool:
    return character in " \t\n\r" or unicodedata.category(character) == "Zs"


def is_control(character: str) -> bool:
    return character not in "\t\n\r" and unicodedata.category(character).startswith("C")


def is_punctuation(character: str) -> bool:
    code = ord(character)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(character).startswith("P")


def is_hanzi(code: int) -> bool:
    return any(first <= code <= last for first, last in HANZI)


def tokenise_like_gpt2_chinese(corpus: Path, folder: Path, tokenizer: PythonBertTokenizer) -> int:
    """Writes tokenized_train_0.txt and so on; returns the number of ids."""
    lines = [line.replace("\n", " [SEP] ") for line in json.loads(corpus.read_text(encoding="utf-8"))]
    share = len(lines) // NUM_PIECES
    count = 0
    for piece in range(NUM_PIECES):
        chosen = lines[share * piece : share * (piece + 1)] if piece < NUM_PIECES - 1 else lines[share * piece :]
        tokenised = [tokenizer.tokenize(line) for line in chosen]
        numbered = [tokenizer.convert_tokens_to_ids(tokens) for tokens in tokenised]
        ids = []
        for article in numbered:
            ids += [tokenizer.ids["[MASK]"], *article, tokenizer.ids["[CLS]"]]
        with (folder / f"tokenized_train_{piece}.txt").open("w", encoding="ascii") as file:
            for number in ids:
                file.write(f"{number} ")
        count += len(ids)
    return count


def measure(corpus: Path, repetitions: int) -> dict[str, Any]:
    """Times the contenders in rounds on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    python_tokenizer = PythonBertTokenizer(DEFAULT_VOCABULARY.read_text(encoding="utf-8").splitlines())
    tokens: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours() -> None:
            tokens["ours"] = build_shards(CorpusSource([corpus]), tokenizer, folder / "shards", NUM_PIECES).num_tokens

        def whole_articles() -> None:
            encoded = encode_articles(tokenizer, json.loads(corpus.read_text(encoding="utf-8")))
            with (folder / "tokens.bin").open("wb") as file:
                for ids in encoded:
                    file.write(np.asarray(ids, dtype=np.uint16).tobytes())
            tokens["tokenizer"] = sum(map(len, encoded))

        def gpt2_chinese() -> None:
            tokens["gpt2_chinese"] = tokenise_like_gpt2_chinese(corpus, folder, python_tokenizer)

        calls: dict[str, Callable[[], None]] = {
            "ours": ours, "tokenizer": whole_articles, "gpt2_chinese": gpt2_chinese,
        }  # fmt: skip
        times = measure_times(calls, repetitions, "cpu")
    size = corpus.stat().st_size
    for entry_name, entry in times.items():
        entry["tokens"] = tokens[entry_name]
        entry["megabytes_per_second"] = size / 1e6 / entry["median_s"]
    return {"corpus": corpus.name, "bytes": size, "vocabulary": len(tokenizer), "contenders": times}


def report(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    machine, contenders = results["machine"], results["contenders"]
    repetitions = len(contenders["ours"]["seconds"])
    spread = max(abs(s / e["median_s"] - 1) for e in contenders.values() for s in e["seconds"])
    slowest = contenders["gpt2_chinese"]["median_s"]
    lines = [
        f"`{results['corpus']}`, {results['bytes'] / 1e6:.2f} MB, vocabulary of {results['vocabulary']:,}; one core "
        f"of {machine['processor']}, tokenizers {machine['versions']['tokenizers']}, Python {machine['python']}; "
        f"commit {machine['commit']}, {machine['date']}. Median of {repetitions} alternating runs; no sample lies "
        f"farther than {spread:.0%} from its median.\n",
        "| | time | least to most | MB/s | tokens/s | as fast as GPT2-Chinese |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, label in LABELS.items():
        entry = contenders[name]
        median = entry["median_s"]
        lines.append(
            f"| {label} | {median:.3f} s | {min(entry['seconds']):.3f} to {max(entry['seconds']):.3f} | "
            f"{entry['megabytes_per_second']:.1f} | {entry['tokens'] / median:,.0f} | {slowest / median:.1f}x |"
        )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a JSON list of articles")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, help="benchmarks/results/tokenisation_<machine>.json if not given")
    parser.add_argument("--report", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or default_result_file("tokenisation", "cpu")
    if not arguments.report and arguments.corpus is None:
        parser.error("--corpus is needed: a JSON list of articles")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the result file, or prints what is there."""
    arguments = parse_arguments(argv)
    if arguments.report:
        print(report(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    measured = measure(arguments.corpus, arguments.repetitions)
    load = statistics.fmean(os.getloadavg()[:2])
    results = {"machine": describe_machine(), "load_average_at_the_end": round(load, 2), **measured}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(arguments.out)
    print(report(results))


if __name__ == "__main__":
    main()
