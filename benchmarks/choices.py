"""Which attention learns best: one factor at a time from one base, and beside GPT-2 and Llama of the same size.

    python benchmarks/choices.py --train novels_chapters.json --validation novels_val.json --context 1024 --steps 1000

Every run sees the same windows in the same order (by its seed), the same optimizer and the same number of steps; only
the model differs. Runs go two at a time, one thread each. Each finished run is added to the result file at once, and
runs found there are not repeated, so that an interrupted series goes on where it stopped. docs/choices.md shows the
tables.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe_machine
from torch import Tensor, nn
from tqdm import tqdm

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.optimization import BETAS, LearningRateSchedule

RESULTS = ROOT / "benchmarks" / "results"

# Written out and not taken from the defaults, which follow from this experiment.
BASE: dict[str, Any] = {
    "bucket_size": 64, "lsh_window": 64, "num_hashes": 4, "lsh_mask": "causal", "key_norm": "rms", "rehash": "fixed",
    "num_local_heads": 2, "num_shifted_heads": 2, "local_keys": "separate", "local_rotary": True,
    "position_type": "axial",
}  # fmt: skip

PLAIN_CHUNKS = {"lsh_mask": "chunked", "num_shifted_heads": 0}
# Each row: what differs from BASE.
ROWS: dict[str, dict[str, Any]] = {
    "base": {},
    "fresh rotations each step": {"rehash": "step"},
    "chunked": PLAIN_CHUNKS,
    "chunked, with value shift": {"lsh_mask": "chunked"},
    "full attention in place of LSH": {"full_attention_threshold": 1 << 20},
    "no local heads": {"num_local_heads": 0, "num_shifted_heads": 4},
    "all heads but one local": {"num_local_heads": 3, "num_shifted_heads": 1},
    "layers local, local, LSH, local": {"num_local_heads": [4, 4, 0, 4], "num_shifted_heads": [0, 0, 4, 0]},
    "layers local, LSH, local, LSH": {"num_local_heads": [4, 0, 4, 0], "num_shifted_heads": [0, 4, 0, 4]},
    "all heads local": {"num_local_heads": 4, "num_shifted_heads": 0},
    "window 2 x bucket": {"lsh_window": 128},
    "2 hashes": {"num_hashes": 2},
    "8 hashes": {"num_hashes": 8},
    "keys of length 1": {"key_norm": "unit"},
    "shared local keys": {"local_keys": "shared"},
    "no rotary on local heads": {"local_rotary": False},
    "no value shift": {"num_shifted_heads": 0},
    "value shift on one of two": {"num_shifted_heads": 1},
    "rotary in place of axial": {"position_type": "rotary"},
    "no positions but local rotary": {"position_type": "none"},
    "duplicate keys counted once": {"allow_duplicate_attention": False},
    "the peers' way": {**PLAIN_CHUNKS, "num_local_heads": 0, "rehash": "step", "key_norm": "unit"},
    "the peers' way, causal window": {
        "num_local_heads": 0, "num_shifted_heads": 0, "rehash": "step", "key_norm": "unit",
    },
    "GPT-2": {"peer": "gpt2"},
    "Llama": {"peer": "llama"},
}  # fmt: skip


def build_model(row: str, sizes: argparse.Namespace, vocab_size: int) -> nn.Module:
    """The model of a row, initialised by its own library's rules from the global seed.

    Args:
        row: a key of ROWS.
        sizes: hidden_size, layers, heads and context.
        vocab_size: number of tokens.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    options = dict(ROWS[row])
    peer = options.pop("peer", None)
    if peer == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                bos_token_id=1,
                eos_token_id=1,
                vocab_size=vocab_size,
                n_positions=sizes.context,
                n_embd=sizes.hidden_size,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )  # fmt: skip
        )
    if peer == "llama":
        # Three matrices of 8/3 of the width hold as much as GPT-2's two of 4.
        inner = round(sizes.hidden_size * 8 / 3 / 8) * 8
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=sizes.hidden_size,
                intermediate_size=inner,
                use_cache=False,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                max_position_embeddings=sizes.context,
                tie_word_embeddings=True,
            )  # fmt: skip
        )
    common = {
        "vocab_size": vocab_size, "hidden_size": sizes.hidden_size, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "max_position_embeddings": sizes.context,
        # Short windows fit: no need to compute anything twice.
        "reversible_threshold": sizes.context,
    }  # fmt: skip
    return ReformerLMForCausalLM(ReformerLMConfig(**{**common, **BASE, **options}))


class Corpus:
    """Characters as tokens: 0 is any unknown character, 1 stands before each article."""

    def __init__(self, train: Path, validation: Path) -> None:
        texts = [json.loads(path.read_text(encoding="utf-8")) for path in (train, validation)]
        characters = sorted({character for text in texts[0] for character in text})
        self.ids = {character: index for index, character in enumerate(characters, start=2)}
        self.vocab_size = len(self.ids) + 2
        self.train, self.validation = (self._encode(articles) for articles in texts)

    def _encode(self, articles: list[str]) -> Tensor:
        return torch.tensor([token for text in articles for token in (1, *(self.ids.get(c, 0) for c in text))])

    def batches(self, context: int, batch: int, seed: int) -> Tensor:
        """Windows of the training text in random order: [steps of one epoch, batch, context]."""
        generator = torch.Generator().manual_seed(seed)
        # Another cut of the same text for each seed.
        offset = int(torch.randint(context, (), generator=generator))
        windows = self.train[offset:].unfold(0, context, context)
        order = torch.randperm(len(windows), generator=generator)
        usable = len(windows) // batch * batch
        return windows[order[:usable]].view(-1, batch, context)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss in nats per token of windows [B, T], each token but the first predicted from those before it."""
    if isinstance(model, ReformerLMForCausalLM):
        return model(tokens, labels=tokens, skip_logits=True).loss
    logits = model(tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, length: int, batch: int, limit: int) -> float:
    """Mean loss over the first ``limit`` pieces of ``length`` tokens, each scored alone."""
    model.eval()
    pieces = tokens.unfold(0, length, length)[:limit]
    total = sum(float(loss_of(model, piece)) * len(piece) for piece in pieces.split(batch))
    model.train()
    return total / len(pieces)


def run(row: str, seed: int, rate: float, sizes: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and validates it.

    Returns:
        The row, the seed, sizes, losses in nats per character (full window, and separate pieces of 32), seconds.
    """
    torch.set_num_threads(sizes.threads)
    corpus = Corpus(sizes.train, sizes.validation)
    torch.manual_seed(seed)
    model = build_model(row, sizes, corpus.vocab_size).to(sizes.device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS)
    schedule = LearningRateSchedule(peak=rate, total_steps=sizes.steps, warmup_steps=sizes.steps // 10)
    batches = corpus.batches(sizes.context, sizes.batch, seed)
    validation = corpus.validation.to(sizes.device)
    curve: list[list[float]] = []
    begin = time.perf_counter()
    recent: list[float] = []
    for step in range(sizes.steps):
        if step and step % len(batches) == 0:
            batches = corpus.batches(sizes.context, sizes.batch, seed + 1000 * (step // len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.autocast(sizes.device, dtype=torch.bfloat16, enabled=sizes.bf16):
            loss = loss_of(model, batches[step % len(batches)].to(sizes.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()))
        if (step + 1) % max(1, sizes.steps // 20) == 0:
            curve.append([step + 1, round(sum(recent) / len(recent), 4)])
            recent.clear()
    seconds = time.perf_counter() - begin
    embedding = model.get_input_embeddings().weight.numel()
    return {
        "row": row, "seed": seed, "lr": rate, "context": sizes.context, "steps": sizes.steps, "batch": sizes.batch,
        "hidden_size": sizes.hidden_size, "layers": sizes.layers, "heads": sizes.heads, "vocab_size": corpus.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_without_token_embedding": sum(p.numel() for p in model.parameters()) - embedding,
        "validation": round(validate(model, validation, sizes.context, sizes.batch, 65536 // sizes.context), 4),
        "validation_32": round(validate(model, validation, 32, 64, 1024), 4),
        "training_curve": curve,
        "seconds": round(seconds, 1),
        # A series may be finished on another machine: each run says where it ran.
        **{name: value for name, value in describe_machine().items() if name in ("commit", "processor", "gpu", "date")},
    }  # fmt: skip


def identity(result: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same run."""
    return tuple(result[name] for name in ("row", "seed", "lr", "context", "steps", "batch", "hidden_size", "layers"))


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown tables of docs/choices.md, one per series (sizes and number of steps).

    Args:
        runs: as in the result file.
    """
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in runs:
        key = tuple(result[name] for name in ("context", "steps", "batch", "hidden_size", "layers", "heads"))
        series.setdefault(key, []).append(result)
    parts = []
    for (context, steps, batch, width, layers, heads), members in sorted(series.items()):
        parts.append(
            f"{layers} layers, hidden size {width}, {heads} heads, windows of {context:,} characters, batch {batch}, "
            f"{steps:,} steps.\n\n"
            "| attention | lr | loss, each seed | mean | against base | pieces of 32 | parameters |\n"
            "|---|---:|---|---:|---:|---:|---:|"
        )
        lines = []
        base = [r for r in members if r["row"] == "base"]
        for row in ROWS:
            for rate in sorted({r["lr"] for r in members if r["row"] == row}):
                found = sorted((r for r in members if r["row"] == row and r["lr"] == rate), key=lambda r: r["seed"])
                mean = sum(r["validation"] for r in found) / len(found)
                # Pairs of the same seed: seeds see other windows in another order.
                pairs = [
                    r["validation"] - b["validation"]
                    for r in found
                    for b in base
                    if b["seed"] == r["seed"] and b["lr"] == rate
                ]
                against = f"{sum(pairs) / len(pairs):+.3f}" if pairs and row != "base" else ""
                short = sum(r["validation_32"] for r in found) / len(found)
                each = " / ".join(f"{r['validation']:.3f}" for r in found)
                parameters = f"{found[0]['parameters'] / 1e6:.2f} M"
                lines.append(
                    (mean, f"| {row} | {rate:g} | {each} | {mean:.3f} | {against} | {short:.3f} | {parameters} |")
                )
        parts[-1] += "\n" + "\n".join(line for _, line in sorted(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Runs what is missing of the asked series, or prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, help="JSON list of articles")
    parser.add_argument("--validation", type=Path, help="JSON list of articles")
    parser.add_argument("--report", action="store_true", help="print the tables of what was run, and run nothing")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "choices.json")
    sizes = parser.parse_args()
    found = json.loads(sizes.out.read_text(encoding="utf-8")) if sizes.out.exists() else {"runs": []}
    if sizes.report:
        print(tables(found["runs"]))
        return
    if sizes.train is None or sizes.validation is None:
        parser.error("--train and --validation are needed: two JSON lists of articles")
    done = {identity(result) for result in found["runs"]}
    # Seeds outermost: a series that is cut short has whole rounds.
    jobs = []
    for seed in sizes.seeds:
        for row in sizes.rows:
            for rate in sizes.lr:
                wanted = (row, seed, rate, sizes.context, sizes.steps, sizes.batch, sizes.hidden_size, sizes.layers)
                if wanted not in done:
                    jobs.append((row, seed, rate))
    spawn = multiprocessing.get_context("spawn")
    # One task per process: a run's memory goes back, and its threads are set before torch does any work.
    with ProcessPoolExecutor(sizes.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(run, row, seed, rate, sizes) for row, seed, rate in jobs]
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="run"):
            result = future.result()
            found["machine"] = describe_machine() | {"workers": sizes.workers, "threads": sizes.threads}
            found["runs"].append(result)
            partial = sizes.out.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(sizes.out)
            shown = math.exp(result["validation"])
            tqdm.write(
                f"{result['row']:34s} seed {result['seed']} lr {result['lr']:g}: {result['validation']:.4f} nats "
                f"(PPL {shown:.1f}), pieces of 32: {result['validation_32']:.4f}, {result['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
