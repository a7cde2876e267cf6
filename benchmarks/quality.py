"""Which model reads novels best after the same time: ours, GPT-2, Llama and reformer-pytorch.

    python benchmarks/quality.py --train novels_chapters.json --validation novels_val.json --minutes 8
    python benchmarks/quality.py --report                # the tables of docs/benchmarks.md, from what was measured

Every contender has the same width, depth, heads, tokens and machine, sees the same windows in the same order (as many
as it manages), and stops when its minutes are over: a step counts with everything in it, validation does not count.
AdamW with warm-up over a twentieth of the time and cosine decay to a tenth over the rest, float32 (--bf16 on a GPU).
The validation text is cut into windows of the training length, each scored alone; perplexity is per character.

reformer-pytorch's attention lets a position see where later tokens hash to (benchmarks/future_leak.py), and it hashes
anew in every pass: what it is said to reach here is no likelihood, and flatters it.

Each finished run goes into benchmarks/results/quality_<machine>.json at once; runs found there are not repeated.
--keep saves the models of transformers' form with their tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import default_result_file, describe_machine
from torch import Tensor, nn
from torch.nn import functional
from training_peers import CONTENDERS, Sizes

LABELS = {"ours": "ours", "llama": "Llama", "gpt2": "GPT-2", "reformer_pytorch": "reformer-pytorch"}
PARTS_OF_A_CURVE = 20


def _llama(sizes: Sizes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # Three matrices of 8/3 of the width hold as much as GPT-2's two of 4.
    inner = round(sizes.hidden_size * 8 / 3 / 8) * 8
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=inner, use_cache=False,
            num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads, max_position_embeddings=sizes.tokens,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def build(name: str, sizes: Sizes) -> nn.Module:
    """A contender, initialised by its own package's rules from the global seed."""
    return _llama(sizes) if name == "llama" else CONTENDERS[name].build(sizes)


def losses_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats of each token but the first of windows [B, T], predicted from those before it: [B, T - 1]."""
    found = model(tokens)
    logits = found if isinstance(found, Tensor) else found.logits
    targets = tokens[:, 1:]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(
        targets
    )


def training_loss(name: str, model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean of the same, by the way that is each package's own."""
    if name == "ours":
        return model(tokens, labels=tokens, skip_logits=True).loss
    if name == "reformer_pytorch":
        return losses_of(model, tokens).mean()
    return model(tokens, labels=tokens).loss


class Text:
    """Articles as one stream of our tokenizer's tokens, each begun and ended as in training.

    Args:
        path: JSON list of articles.
        tokenizer: as train_reformer.py loads it.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        from reformer_lm.text import encode_articles

        articles = json.loads(path.read_text(encoding="utf-8"))
        self.tokens = torch.tensor([token for ids in encode_articles(tokenizer, articles) for token in ids])
        self.tokens_per_character = len(self.tokens) / sum(len(article) for article in articles)

    def batches(self, context: int, batch: int, seed: int) -> Tensor:
        """Windows in random order: [steps of one epoch, batch, context]."""
        generator = torch.Generator().manual_seed(seed)
        offset = int(torch.randint(context, (), generator=generator))
        windows = self.tokens[offset:].unfold(0, context, context)
        order = torch.randperm(len(windows), generator=generator)
        usable = len(windows) // batch * batch
        return windows[order[:usable]].view(-1, batch, context)


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, context: int, batch: int) -> Tensor:
    """Mean nats at each position of a window but the first: [context - 1]."""
    model.eval()
    windows = tokens.unfold(0, context, context)
    total = torch.zeros(context - 1, dtype=torch.float64)
    for piece in windows.split(batch):
        total += losses_of(model, piece).double().sum(0).cpu()
    model.train()
    return total / len(windows)


def train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], text: Text, rate: float, budget: float, settings: Any
) -> tuple[int, list[list[float]]]:
    """Trains until the time is over.

    Args:
        model: on its device, in training mode.
        loss: of windows [B, T].
        text: to train on.
        rate: highest learning rate.
        budget: seconds.
        settings: context, batch, seed, bf16.

    Returns:
        Steps made, and the curve: [seconds, mean loss since the point before].
    """
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    step, epoch, batches = 0, 0, text.batches(settings.context, settings.batch, settings.seed)
    curve: list[list[float]] = []
    recent: list[Tensor] = []
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < budget:
        position = step - epoch * len(batches)
        if position == len(batches):
            epoch, position = epoch + 1, 0
            batches = text.batches(settings.context, settings.batch, settings.seed + epoch)
        # By the clock: how many steps there will be is not known before.
        share = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 0.05 + share * 19, 0.55 + 0.45 * math.cos(math.pi * (share - 0.05) / 0.95))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            value = loss(batches[position].to(device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(value.detach())
        step += 1
        if spent >= budget * (len(curve) + 1) / PARTS_OF_A_CURVE:
            curve.append([round(spent, 1), float(torch.stack(recent).mean())])
            recent.clear()
    return step, curve


def run(name: str, context: int, rate: float, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains one contender for its minutes and validates it; one entry of the result file."""
    from reformer_lm.text import load_tokenizer

    tokenizer = load_tokenizer()
    text, validation = (Text(path, tokenizer) for path in (settings.train, settings.validation))
    sizes = Sizes(context, settings.hidden_size, settings.depth, settings.heads, len(tokenizer))
    settings.context, settings.batch = context, max(1, settings.tokens_per_step // context)
    torch.manual_seed(settings.seed)
    model = build(name, sizes).to(settings.device).train()
    # The first pass of a process is slower than those after it.
    training_loss(name, model, text.batches(context, settings.batch, 0)[0].to(settings.device)).backward()
    model.zero_grad()
    budget = settings.minutes * 60
    steps, curve = train(
        model, lambda tokens: training_loss(name, model, tokens), text, rate, budget, settings
    )  # fmt: skip
    by_position = validate(model, validation.tokens.to(settings.device), context, settings.batch)
    if settings.keep is not None and hasattr(model, "save_pretrained"):
        folder = settings.keep / f"{name}_{context}"
        model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Bounds of the parts double: 1 to 31, 32 to 63, ...
    bounds = [1, *(2**power for power in range(5, 30) if 2**power < context), context]
    parts = [[a, b - 1, float(by_position[a - 1 : b - 1].mean())] for a, b in zip(bounds, bounds[1:], strict=False)]
    return {
        "contender": name, "context": context, "lr": rate, "seed": settings.seed, "minutes": settings.minutes,
        "batch": settings.batch, "hidden_size": sizes.hidden_size, "depth": sizes.depth, "heads": sizes.heads,
        "vocab_size": sizes.vocab_size, "steps": steps, "tokens_seen": steps * settings.batch * context,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(by_position.mean()), "tokens_per_character": validation.tokens_per_character,
        "loss_by_position": parts, "training_curve": curve,
        **{key: value for key, value in describe_machine().items() if key in ("commit", "processor", "gpu", "date")},
    }  # fmt: skip


def perplexity(entry: dict[str, Any], loss: float | None = None) -> float:
    """Per character: the nats of all tokens, spread over the characters of the text."""
    return math.exp((entry["loss"] if loss is None else loss) * entry["tokens_per_character"])


def best_runs(runs: list[dict[str, Any]], context: int) -> dict[str, dict[str, Any]]:
    """Of each contender the run with the lowest loss, best first."""
    members = sorted((r for r in runs if r["context"] == context), key=lambda entry: entry["loss"])
    best: dict[str, dict[str, Any]] = {}
    for entry in members:
        best.setdefault(entry["contender"], entry)
    return best


def report(results: dict[str, Any]) -> str:
    """Markdown: per window length all runs, and of each contender's best run the perplexity by position."""
    machine, runs = results["machine"], results["runs"]
    first = runs[0]
    where = machine["gpu"] or f"{machine['processor']} ({machine['cpu_capability']}), {machine['threads']} threads"
    versions = ", ".join(f"{p} {machine['versions'][p]}" for p in ("torch", "transformers", "reformer-pytorch"))
    lines = [
        f"{where}; {versions}; commit {first['commit']}, {first['date']}. {first['depth']} layers, width "
        f"{first['hidden_size']}, {first['heads']} heads, vocabulary {first['vocab_size']:,}; {first['minutes']:g} "
        f"minutes of training each.",
    ]
    for context in sorted({entry["context"] for entry in runs}):
        members = sorted((r for r in runs if r["context"] == context), key=lambda entry: entry["loss"])
        lines += [
            f"\nWindows of {context:,} tokens, {members[0]['batch']} a step:\n",
            "| | lr | seed | parameters | steps | tokens seen | nats per token | PPL per character |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {LABELS[e['contender']]} | {e['lr']:g} | {e['seed']} | {e['parameters'] / 1e6:.2f} M | {e['steps']:,} "
            f"| {e['tokens_seen'] / 1e6:.2f} M | {e['loss']:.3f} | {perplexity(e):.1f} |"
            for e in members
        ]
        best = best_runs(runs, context)
        lines += [
            "\nPPL per character by the position in the window, of each one's best run:\n",
            "| positions | " + " | ".join(LABELS[name] for name in best) + " |",
            "|---|" + "---:|" * len(best),
        ]
        for index, (low, high, _) in enumerate(next(iter(best.values()))["loss_by_position"]):
            cells = [f"{perplexity(e, e['loss_by_position'][index][2]):.1f}" for e in best.values()]
            lines.append(f"| {low:,} to {high:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, or prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, help="JSON list of articles")
    parser.add_argument("--validation", type=Path, help="JSON list of articles")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--contenders", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens_per_step", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the trained models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    settings = parser.parse_args(arguments)
    out: Path = settings.out or default_result_file("quality", settings.device)
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": []}
    if settings.report:
        print(report(results))
        return
    if settings.train is None or settings.validation is None:
        parser.error("--train and --validation are needed: two JSON lists of articles")
    keys = ("context", "seed", "lr", "contender", "minutes", "hidden_size", "depth", "heads")
    done = {tuple(entry[key] for key in keys) for entry in results["runs"]}
    for context in settings.contexts:
        for seed in settings.seeds:
            for rate in settings.lr:
                for name in settings.contenders:
                    sizes = (settings.minutes, settings.hidden_size, settings.depth, settings.heads)
                    if (context, seed, rate, name, *sizes) in done:
                        continue
                    settings.seed = seed
                    entry = run(name, context, rate, settings)
                    results = {"machine": describe_machine(), "runs": [*results["runs"], entry]}
                    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                    print(
                        f"{LABELS[name]}, {context:,} tokens, lr {rate:g}: {entry['steps']} steps, "
                        f"{entry['loss']:.3f} nats, PPL per character {perplexity(entry):.1f}",
                        flush=True,
                    )
    print(report(results))


if __name__ == "__main__":
    main()
