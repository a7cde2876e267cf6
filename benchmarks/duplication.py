"""The duplication task of Kitaev et al. 2020, section 5: how many hashes it takes to find what is to be repeated.

    python benchmarks/duplication.py                     # what a CPU has time for
    python benchmarks/duplication.py --full              # the paper's sizes; the default where there is a GPU
    python benchmarks/duplication.py --report            # the tables of docs/benchmarks.md, from what was measured

A sequence is 0 w 0 w, where w is a string of random symbols. A model of one layer, all of its heads LSH heads, learns
the second w from loss on that w alone. It is trained with full attention or with 4, 2 or 1 hash rounds (fresh
rotations each step, as in the paper), and its weights are then judged with full attention and with 8, 4, 2 and 1
rounds, on strings that it has not seen. Three modes:

    shifted     lsh_mask="causal", heads that read what followed a match: what this package does by default
    causal      lsh_mask="causal", heads that read the match itself, as in the paper
    chunked     lsh_mask="chunked", the paper's and reformer-pytorch's chunks of the sorted order

With full attention the last two are one model, which is trained once.

Each trained model goes into benchmarks/results/duplication_<machine>.json at once; what is found there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import default_result_file, describe_machine
from torch import Tensor
from torch.nn import functional

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.fitting import fit

TRAINED = ("full", "4", "2", "1")
EVALUATED = ("full", "8", "4", "2", "1")
MODES: dict[str, dict[str, Any]] = {
    "shifted": {"lsh_mask": "causal", "num_shifted_heads": 4},
    "causal": {"lsh_mask": "causal", "num_shifted_heads": 0},
    "chunked": {"lsh_mask": "chunked", "num_shifted_heads": 0},
}
TITLES = {
    "shifted": 'Causal window, heads read what followed a match (`lsh_mask="causal"`, the default)',
    "causal": 'Causal window, heads read the match itself (`lsh_mask="causal", num_shifted_heads=0`)',
    "chunked": 'Chunks, as in the paper and reformer-pytorch (`lsh_mask="chunked"`)',
}
# Of the strings that models are judged by; no training seed comes near it.
TEST_SEED = 1 << 40


@dataclass(frozen=True)
class Setup:
    """Sizes of task and training.

    Attributes:
        word: symbols in w; a sequence has twice one more.
        vocab_size: symbols and the marker 0.
        bucket_size: tokens in a chunk; also the window of the causal modes.
        hidden_size: width of the model and of its feed-forward block.
        steps: optimizer steps.
        batch: sequences a step.
        lr: highest learning rate.
        seed: of initial weights and training strings.
        tests: strings to judge by.
    """

    word: int
    vocab_size: int
    bucket_size: int
    hidden_size: int
    steps: int
    batch: int
    lr: float
    seed: int
    tests: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * (self.word + 1)


# Sizes of the paper where it gives them; it does not say how many strings a step takes.
FULL = Setup(
    word=511, vocab_size=128, bucket_size=32, hidden_size=256, steps=150_000, batch=32, lr=1e-3, seed=0, tests=1024
)
SHORT = replace(FULL, word=31, bucket_size=8, steps=150, batch=16, lr=2e-3, tests=512)


def sequences(count: int, setup: Setup, generator: torch.Generator) -> Tensor:
    """Sequences 0 w 0 w: int64 [count, length]."""
    words = torch.randint(1, setup.vocab_size, (count, setup.word), generator=generator)
    half = functional.pad(words, (1, 0), value=0)
    return torch.cat((half, half), dim=1)


def batches(setup: Setup) -> Iterator[dict[str, Tensor]]:
    """Endless training batches; labels are the second w."""
    generator = torch.Generator().manual_seed(setup.seed)
    while True:
        tokens = sequences(setup.batch, setup, generator)
        labels = tokens.clone()
        labels[:, : setup.word + 2] = -100
        yield {"input_ids": tokens, "labels": labels}


def build(mode: str, attention: str, setup: Setup) -> ReformerLMForCausalLM:
    """A model of one layer.

    Args:
        mode: a key of MODES.
        attention: "full", or the number of hash rounds.
        setup: its sizes.
    """
    full = attention == "full"
    config = ReformerLMConfig(
        vocab_size=setup.vocab_size, hidden_size=setup.hidden_size, intermediate_size=setup.hidden_size,
        num_hidden_layers=1, num_attention_heads=4, num_local_heads=0, max_position_embeddings=setup.length,
        bucket_size=setup.bucket_size, position_type="absolute", rehash="step", reversible="off",
        num_hashes=1 if full else int(attention), full_attention_threshold=setup.length if full else 0, **MODES[mode],
    )  # fmt: skip
    return ReformerLMForCausalLM(config)


@torch.no_grad()
def evaluate(model: ReformerLMForCausalLM, mode: str, attention: str, setup: Setup) -> dict[str, float]:
    """Judges weights with another attention.

    Args:
        model: trained, on its device.
        mode: a key of MODES.
        attention: one of EVALUATED.
        setup: of the training.

    Returns:
        "loss" in nats a symbol, and "accuracy" from 0 to 1, of the second w.
    """
    device = model.device
    judged = build(mode, attention, setup).to(device).eval()
    judged.load_state_dict(model.state_dict())
    tokens = sequences(setup.tests, setup, torch.Generator().manual_seed(TEST_SEED)).to(device)
    loss, right = 0.0, 0
    for piece in tokens.split(setup.batch):
        logits = judged(piece).logits[:, setup.word + 1 : -1]
        targets = piece[:, setup.word + 2 :]
        loss += float(functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
    count = setup.tests * setup.word
    return {"loss": loss / count, "accuracy": right / count}


def run(mode: str, trained: str, setup: Setup, device: str) -> list[dict[str, Any]]:
    """Trains one model and judges it.

    Returns:
        An entry of the result file for each mode in which this is the model: one, but for full attention.
    """
    torch.manual_seed(setup.seed)
    model = build(mode, trained, setup).to(device)
    begin = time.perf_counter()
    losses = fit(model, batches(setup), steps=setup.steps, learning_rate=setup.lr, weight_decay=0.0)
    seconds = time.perf_counter() - begin
    points = max(1, setup.steps // 20)
    machine = describe_machine()
    same = [
        other
        for other in MODES
        if other == mode
        or (trained == "full" and MODES[other]["num_shifted_heads"] == MODES[mode]["num_shifted_heads"])
    ]
    return [
        {
            "mode": other, "trained": trained, **asdict(setup),
            "evaluated": {attention: evaluate(model, other, attention, setup) for attention in EVALUATED},
            "training_curve": [
                [min(at + points, setup.steps), sum(part) / len(part)]
                for at in range(0, setup.steps, points)
                if (part := losses[at : at + points])
            ],
            "seconds": round(seconds, 1), "parameters": sum(p.numel() for p in model.parameters()),
            **{key: machine[key] for key in ("commit", "processor", "threads", "gpu", "date")},
        }
        for other in same
    ]  # fmt: skip


def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two entries the same."""
    return tuple(entry[key] for key in ("mode", "trained", *Setup.__dataclass_fields__))


def report(results: dict[str, Any]) -> str:
    """Markdown: for each setup and mode the accuracy in %, and the loss behind it."""
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['processor']} ({machine['cpu_capability']}), {machine['threads']} thread(s)"
    lines = [f"{where}; torch {machine['versions']['torch']}; commit {machine['commit']}, {machine['date']}."]
    setups = list(dict.fromkeys(Setup(**{k: e[k] for k in Setup.__dataclass_fields__}) for e in results["runs"]))
    for setup in setups:
        lines.append(
            f"\n|w| = {setup.word}, length {setup.length:,}, {setup.vocab_size - 1} symbols, hidden size "
            f"{setup.hidden_size}, 4 heads, chunks of {setup.bucket_size}; {setup.steps:,} steps of {setup.batch} "
            f"strings, learning rate {setup.lr:g}, seed {setup.seed}. Accuracy on the second w in % (loss in nats), "
            f"over {setup.tests:,} new strings."
        )
        for mode in MODES:
            members = {
                e["trained"]: e
                for e in results["runs"]
                if e["mode"] == mode and all(e[k] == v for k, v in asdict(setup).items())
            }
            if not members:
                continue
            lines += [
                f"\n{TITLES[mode]}:\n",
                "| trained with \\ evaluated with | " + " | ".join(_label(name) for name in EVALUATED) + " |",
                "|---|" + "---:|" * len(EVALUATED),
            ]
            for trained in (name for name in TRAINED if name in members):
                found = members[trained]["evaluated"]
                cells = [f"{100 * found[a]['accuracy']:.1f} ({found[a]['loss']:.2f})" for a in EVALUATED]
                lines.append(f"| {_label(trained)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _label(attention: str) -> str:
    return "full" if attention == "full" else f"LSH-{attention}"


def main(arguments: list[str] | None = None) -> None:
    """Trains what is missing, or prints what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, help="the paper's sizes (yes on a GPU)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=TRAINED, metavar="ATTENTION")
    for name, value in asdict(SHORT).items():
        parser.add_argument(f"--{name}", type=type(value), help=f"{value}; with --full {getattr(FULL, name)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    settings = parser.parse_args(arguments)
    full = settings.device == "cuda" if settings.full is None else settings.full
    given = {name: getattr(settings, name) for name in asdict(SHORT) if getattr(settings, name) is not None}
    setup = replace(FULL if full else SHORT, **given)
    out: Path = settings.out or default_result_file("duplication", settings.device)
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": []}
    if settings.report:
        if not results["runs"]:
            parser.error(f"nothing has been measured yet: {out} has no runs")
        print(report(results))
        return
    for trained in settings.trained:
        for mode in settings.modes:
            done = {identity(entry) for entry in results["runs"]}
            if identity({"mode": mode, "trained": trained, **asdict(setup)}) in done:
                continue
            entries = [e for e in run(mode, trained, setup, settings.device) if identity(e) not in done]
            results = {"machine": describe_machine(), "runs": [*results["runs"], *entries]}
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            partial.replace(out)
            for entry in entries:
                shown = ", ".join(f"{_label(a)} {100 * r['accuracy']:.1f} %" for a, r in entry["evaluated"].items())
                print(
                    f"{entry['mode']}, trained with {_label(trained)} in {entry['seconds']:.0f} s: {shown}", flush=True
                )
    print(report(results))


if __name__ == "__main__":
    main()
