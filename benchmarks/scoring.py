"""Scoring sentences: how many a second, in how much memory, and whether fluent ones win against damaged copies.

    python benchmarks/scoring.py speed --sentences sentences.jsonl
    python benchmarks/scoring.py ways --sentences sentences.jsonl
    python benchmarks/scoring.py memory --sentences sentences.jsonl
    python benchmarks/scoring.py accuracy --sentences sentences.jsonl --models "ours=model" "GPT-2=gpt2_model"
    python benchmarks/scoring.py report                  # the tables of docs/benchmarks.md, from what was measured

speed: `reformer_lm.scoring.score` on the sentences twenty times over, beside the usual loop, one sentence at a time
through `model(ids, labels=ids).loss` of each peer; models of one size (configs/tiny.json), alternating repetitions;
all but reformer-pytorch with weights in bfloat16, too.
ways: what each of the things brings that make it fast (scoring_ways.py).
memory: peak resident memory of processes that score ever more sentences with a small model.
accuracy: of each sentence and four damaged copies (damage.py), how often the model finds the sentence more fluent; and
how far its numbers move with weights in bfloat16.
Each part goes into benchmarks/results/scoring_<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from damage import KINDS, damaged
from machine import ROOT, default_result_file, describe_machine
from scoring_ways import measure_ways, our_model, ways_table

SPEED_LABELS = {
    "ours": "`score()`",
    "ours_bfloat16": "`score()`, bfloat16",
    "reformer_pytorch": "reformer-pytorch, one at a time",
    "transformers_reformer": "transformers' Reformer, one at a time",
    "transformers_reformer_bfloat16": "transformers' Reformer, bfloat16, one at a time",
    "gpt2": "GPT-2 (SDPA), one at a time",
    "gpt2_bfloat16": "GPT-2 (SDPA), bfloat16, one at a time",
    "ours_one_by_one": "our model, one at a time",
}
TIMES, WAYS_TIMES = 20, 4
COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def read_sentences(path: Path) -> list[str]:
    """The ``text`` of each line."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- speed


def one_by_one(loss: Callable[[torch.Tensor], Any], tokenizer: Any, sentences: list[str]) -> None:
    """The usual loop: the loss of each sentence behind the start of an article."""
    with torch.no_grad():
        for sentence in sentences:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(sentence)]])
            math.exp(float(loss(ids)))


def speed_calls(tokenizer: Any, sentences: list[str], peer_sentences: int) -> dict[str, tuple[int, Callable[[], None]]]:
    """For each contender how many sentences it scores in a repetition, and the call."""
    from reformer_pytorch import ReformerLM
    from reformer_pytorch.generative_tools import TrainingWrapper
    from transformers import GPT2Config, GPT2LMHeadModel, ReformerConfig, ReformerModelWithLMHead

    from reformer_lm.scoring import score

    settings = json.loads((ROOT / "configs" / "tiny.json").read_text(encoding="utf-8"))["model"]
    width, depth, heads = (settings[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    size, tokens = len(tokenizer), 1024
    ours, ours_bfloat16 = our_model(tokenizer), our_model(tokenizer, torch.bfloat16)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_positions=tokens, n_embd=width, n_layer=depth, n_head=heads, use_cache=False,
            bos_token_id=1, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    theirs = ReformerModelWithLMHead(
        ReformerConfig(
            vocab_size=size, hidden_size=width, num_attention_heads=heads, attention_head_size=width // heads,
            attn_layers=["lsh"] * depth, feed_forward_size=4 * width, num_hashes=4, lsh_attn_chunk_length=64,
            num_buckets=16, is_decoder=True, axial_pos_shape=(32, 32), axial_pos_embds_dim=(width // 4, 3 * width // 4),
            max_position_embeddings=tokens, use_cache=False,
        )
    ).eval()  # fmt: skip
    wrapper = TrainingWrapper(
        ReformerLM(
            num_tokens=size, dim=width, depth=depth, max_seq_len=tokens, heads=heads, bucket_size=64, n_hashes=4,
            causal=True,
        )
    ).eval()  # fmt: skip
    some = sentences[:peer_sentences]
    models = {
        "transformers_reformer": theirs, "transformers_reformer_bfloat16": deepcopy(theirs).bfloat16(), "gpt2": gpt2,
        "gpt2_bfloat16": deepcopy(gpt2).bfloat16(), "ours_one_by_one": ours,
    }  # fmt: skip
    loops: dict[str, Callable[[torch.Tensor], Any]] = {"reformer_pytorch": lambda ids: wrapper(ids, return_loss=True)}
    for name, model in models.items():
        loops[name] = lambda ids, model=model: model(ids, labels=ids).loss
    many = sentences * TIMES
    calls: dict[str, tuple[int, Callable[[], None]]] = {
        "ours": (len(many), lambda: score(ours, tokenizer, many)),
        "ours_bfloat16": (len(many), lambda: score(ours_bfloat16, tokenizer, many)),
    }
    for name, loss in loops.items():
        calls[name] = (len(some), lambda loss=loss: one_by_one(loss, tokenizer, some))
    return calls


def measure_speed(sentences: list[str], repetitions: int, peer_sentences: int) -> dict[str, Any]:
    """Sentences a second of each contender, in rounds of rotating order."""
    from reformer_lm.text import load_tokenizer

    calls = speed_calls(load_tokenizer(), sentences, peer_sentences)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name, (_, call) in calls.items():
        if name not in ("ours", "ours_bfloat16"):
            call()
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            count, call = calls[name]
            begin = time.perf_counter()
            call()
            rates[name].append(count / (time.perf_counter() - begin))
            print(f"{SPEED_LABELS[name]}: {rates[name][-1]:,.1f} sentences/s", flush=True)
    return {name: {"sentences": calls[name][0], "per_second": values} for name, values in rates.items()}


# --- memory


def score_many(path: Path, count: int) -> None:
    """In a process of its own: score so many sentences and print the peak memory."""
    from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
    from reformer_lm.scoring import ScoreTotals, score_stream
    from reformer_lm.text import load_tokenizer

    sentences = read_sentences(path)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        characters = sorted({character for sentence in sentences for character in sentence})
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), encoding="utf-8")
        tokenizer = load_tokenizer(vocabulary)
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(
        ReformerLMConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    totals = ScoreTotals()
    for score in score_stream(model, tokenizer, islice(cycle(sentences), count)):
        totals.add(score)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"sentences": totals.texts, "tokens": totals.tokens, "peak_bytes": peak}))


def measure_memory(path: Path, counts: list[int]) -> list[dict[str, Any]]:
    """Peak resident memory of processes that score so many sentences."""
    rows = []
    for count in counts:
        command = [sys.executable, __file__, "child", "--sentences", str(path), "--counts", str(count)]
        begin = time.perf_counter()
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {**json.loads(finished.stdout.splitlines()[-1]), "seconds": time.perf_counter() - begin}
        rows.append(row)
        print(row, flush=True)
    return rows


# --- accuracy


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def measure_accuracy(folder: Path, sentences: list[str]) -> dict[str, Any]:
    """How often a model prefers a sentence to its damaged copy, by likelihood and by PPL per token."""
    from reformer_lm.prediction.saved_model import load_model
    from reformer_lm.scoring import Score, ScoreTotals, score

    copies = {kind: [damaged(sentence, kind, seed) for seed, sentence in enumerate(sentences)] for kind in KINDS}
    totals: dict[torch.dtype, ScoreTotals] = {}
    scores: dict[torch.dtype, dict[str, list[Score]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model(folder, torch.device("cpu"), dtype)
        found = {kind: score(model, tokenizer, [c or "" for c in copies[kind]]) for kind in KINDS}
        scores[dtype] = {"fluent": score(model, tokenizer, sentences), **found}
        totals[dtype] = ScoreTotals()
        for one in scores[dtype]["fluent"]:
            totals[dtype].add(one)
    kinds, changed = {}, 0
    for kind in KINDS:
        places = [index for index, copy in enumerate(copies[kind]) if copy is not None]
        pairs = [(scores[torch.float32]["fluent"][i], scores[torch.float32][kind][i]) for i in places]
        low = [(scores[torch.bfloat16]["fluent"][i], scores[torch.bfloat16][kind][i]) for i in places]
        changed += sum((a.ppl < b.ppl) != (c.ppl < d.ppl) for (a, b), (c, d) in zip(pairs, low, strict=True))
        kinds[kind] = {
            "pairs": len(pairs),
            "right_by_likelihood": sum(good.nll < bad.nll for good, bad in pairs),
            "right_by_ppl": sum(good.ppl < bad.ppl for good, bad in pairs),
        }
    both = zip(*(scores[dtype]["fluent"] for dtype in (torch.float32, torch.bfloat16)), strict=True)
    moved = [abs(low.ppl / exact.ppl - 1) for exact, low in both]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ppl_per_character": totals[torch.float32].ppl_per_character, "kinds": kinds,
        "bfloat16": {
            "ppl_per_character": totals[torch.bfloat16].ppl_per_character, "median_change": statistics.median(moved),
            "largest_change": max(moved), "decisions_changed": changed,
        },
    }  # fmt: skip


# --- tables


def report(results: dict[str, Any]) -> str:
    """Markdown of all parts that were measured."""
    parts = []
    if "speed" in results:
        rates = {name: entry["per_second"] for name, entry in results["speed"].items()}
        own = statistics.median(rates["ours"])
        lines = ["| | sentences/s | `score()` is faster by |", "|---|---:|---:|"]
        for name, values in rates.items():
            middle = statistics.median(values)
            gain = "" if name in ("ours", "ours_bfloat16") else f"{own / middle:.1f}x"
            lines.append(
                f"| {SPEED_LABELS[name]} | {middle:,.1f} ({min(values):,.1f} to {max(values):,.1f}) | {gain} |"
            )
        parts.append("\n".join(lines))
    if "ways" in results:
        parts.append(ways_table(results["ways"]))
    if "memory" in results:
        lines = ["| sentences | tokens | peak of the process | seconds |", "|---:|---:|---:|---:|"]
        lines += [
            f"| {row['sentences']:,} | {row['tokens']:,} | {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {row['seconds']:,.0f} |"
            for row in results["memory"]
        ]
        parts.append("\n".join(lines))
    if "accuracy" in results:
        entries = results["accuracy"]
        lines = [
            "| damage | judged by | " + " | ".join(entries) + " |",
            "|---|---|" + "---:|" * len(entries),
            "| (PPL per character of the sentences) | | "
            + " | ".join(f"{entry['ppl_per_character']:.1f}" for entry in entries.values())
            + " |",
        ]
        for kind, name in KINDS.items():
            for key, label in (("right_by_likelihood", "likelihood"), ("right_by_ppl", "PPL")):
                cells = []
                for entry in entries.values():
                    count, right = entry["kinds"][kind]["pairs"], entry["kinds"][kind][key]
                    low, high = wilson(right, count)
                    cells.append(f"{right / count:.1%} ({low:.1%} to {high:.1%})")
                lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
        lines = [
            "| weights in bfloat16 | PPL per character | a sentence's PPL moves by | at most | decisions changed |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, entry in entries.items():
            low, pairs = entry["bfloat16"], sum(kind["pairs"] for kind in entry["kinds"].values())
            lines.append(
                f"| {name} | {low['ppl_per_character']:.1f} | {low['median_change']:.2%} | {low['largest_change']:.1%} "
                f"| {low['decisions_changed']} of {pairs:,} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("speed", "ways", "memory", "accuracy", "report", "child"))
    parser.add_argument("--sentences", type=Path, help='JSON lines, {"text": ...}')
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer_sentences", type=int, default=200)
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=default_result_file("scoring", "cpu"))
    found = parser.parse_args(arguments)
    if found.part != "report" and found.sentences is None:
        parser.error("--sentences is needed: JSON lines with a text each")
    return found


def numbered(models: list[str]) -> Iterator[tuple[str, Path]]:
    """Names and folders of NAME=FOLDER."""
    for model in models:
        name, _, folder = model.partition("=")
        yield name, Path(folder)


def main(arguments: list[str] | None = None) -> None:
    """Measures one part, or prints what was measured."""
    found = parse(arguments)
    if found.part == "child":
        score_many(found.sentences, found.counts[0])
        return
    results: dict[str, Any] = json.loads(found.out.read_text(encoding="utf-8")) if found.out.exists() else {}
    if found.part != "report":
        from reformer_lm.text import load_tokenizer

        if found.part == "speed":
            results["speed"] = measure_speed(read_sentences(found.sentences), found.repetitions, found.peer_sentences)
        elif found.part == "ways":
            sentences = read_sentences(found.sentences) * WAYS_TIMES
            results["ways"] = measure_ways(load_tokenizer(), sentences, found.repetitions)
        elif found.part == "memory":
            results["memory"] = measure_memory(found.sentences, found.counts)
        else:
            sentences = read_sentences(found.sentences)
            results["accuracy"] = {name: measure_accuracy(folder, sentences) for name, folder in numbered(found.models)}
        results.setdefault("machines", {})[found.part] = describe_machine()
        found.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
