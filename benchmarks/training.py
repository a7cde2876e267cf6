"""What a training loop costs beside the model: tokens/s of whole runs.

    python benchmarks/training.py --corpus novels_chapters.json
    python benchmarks/training.py --report               # the table of docs/benchmarks.md, from what was measured

Four ways to train for some hundred steps at 1,024 tokens on the same text, in one process, in rounds of rotating order:

- the bare step of our model: forward, backward, clipping, AdamW, on batches made beforehand;
- our training loop as train_reformer.py runs it: memory-mapped windows, a line and TensorBoard points every ten steps;
- reformer-pytorch in the manner of its enwik8 example: a DataLoader of random windows, TrainingWrapper, Adam, the loss
  printed each step;
- GPT-2 of the same width, depth and heads in the manner of GPT2-Chinese: token ids read from a text file, windows
  shuffled as lists, tensors made in the loop, a line and TensorBoard points every ten steps.

What the two peers' loops do was written down anew from what their scripts do. Results go into
benchmarks/results/training_<machine>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import default_result_file, describe_machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter

LABELS = {
    "bare": "our model's bare step",
    "ours": "our training loop",
    "reformer_pytorch": "reformer-pytorch, its example's loop",
    "gpt2_chinese": "GPT-2, GPT2-Chinese's loop",
}
TOKENS = 1024
LEARNING_RATE = 1e-4
LOG_STEP = 10


def our_model(tokenizer: Any) -> nn.Module:
    from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

    settings = json.loads((Path(__file__).parents[1] / "configs" / "tiny.json").read_text(encoding="utf-8"))["model"]
    torch.manual_seed(0)
    config = ReformerLMConfig(**{**settings, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS})
    return ReformerLMForCausalLM(config)


def bare(model: nn.Module, ids: np.ndarray, steps: int) -> float:
    """Seconds of the model's steps alone."""
    from reformer_lm.training.optimization import build_optimizer

    batches = [window(ids, step) for step in range(steps)]
    optimizer = build_optimizer(model, LEARNING_RATE, 0.1)
    model.train()
    begin = time.perf_counter()
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


def window(ids: np.ndarray, number: int) -> Tensor:
    begin = number * TOKENS % (len(ids) - TOKENS)
    return torch.from_numpy(ids[begin : begin + TOKENS].astype(np.int64)).unsqueeze(0)


def ours(model: nn.Module, ids: np.ndarray, steps: int, tokenizer: Any, folder: Path) -> tuple[float, float]:
    """Seconds of our loop from its first step to its last, without the checkpoint at the end.

    Returns:
        Of the whole, and of that what the bare step does, too: forward and backward pass, clipping, update.
    """
    from reformer_lm.corpus import TokenStream, TokenWindows
    from reformer_lm.training.batches import TrainingPlan
    from reformer_lm.training.checkpoints import CheckpointStore
    from reformer_lm.training.devices import create_accelerator
    from reformer_lm.training.interruption import StopRequest
    from reformer_lm.training.loop import LoopSettings, TrainingLoop
    from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer
    from reformer_lm.training.reporting import Reporter
    from reformer_lm.training.state import DataIdentity

    class Unsaved(TrainingLoop):
        def _save(self, **options: Any) -> None:
            self.end = time.perf_counter()

    path = folder / "tokens.bin"
    ids.astype("<u2").tofile(path)
    windows = TokenWindows(TokenStream([np.memmap(path, dtype="<u2", mode="r")]), TOKENS, TOKENS)
    with Reporter(LOG_STEP) as reporter, contextlib.redirect_stdout(io.StringIO()):
        reporter.start(0, steps, str(folder / "curves"))
        loop = Unsaved(
            accelerator=create_accelerator(torch.device("cpu")), model=model,
            optimizer=build_optimizer(model, LEARNING_RATE, 0.1), tokenizer=tokenizer, windows=windows,
            validation=None, plan=TrainingPlan(len(windows), 1, 1, 1000, 0, max_steps=steps),
            schedule=LearningRateSchedule(LEARNING_RATE, steps, 0, "constant"), store=CheckpointStore(folder / "model"),
            settings=LoopSettings(batch_size=1), identity=DataIdentity(len(ids), "", TOKENS, TOKENS, 0),
            reporter=reporter, stop=StopRequest(), options={},
        )  # fmt: skip
        watch = Watch()
        loop.runner.model.register_forward_pre_hook(lambda *_: watch.begin())
        loop.runner.model.register_forward_hook(lambda *_: watch.end())
        for owner, name in (
            (loop.accelerator, "backward"), (loop.processes, "clip_gradients"), (loop.optimizer, "step"),
            (loop.optimizer, "zero_grad"),
        ):  # fmt: skip
            setattr(owner, name, watch.watched(getattr(owner, name)))
        begin = time.perf_counter()
        loop.run()
    return loop.end - begin, watch.seconds


class Watch:
    """Adds up the seconds between its beginnings and ends."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def begin(self) -> None:
        """Seconds count from now on."""
        self._since = time.perf_counter()

    def end(self) -> None:
        """Until now."""
        self.seconds += time.perf_counter() - self._since

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, whose seconds count."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.begin()
            try:
                return call(*arguments, **options)
            finally:
                self.end()

        return timed


class RandomWindows(Dataset[Tensor]):
    """Windows from anywhere in the text."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int64))

    def __len__(self) -> int:
        return len(self.ids) // TOKENS

    def __getitem__(self, index: int) -> Tensor:
        begin = int(torch.randint(0, len(self.ids) - TOKENS - 1, (1,)))
        return self.ids[begin : begin + TOKENS + 1]


def reformer_pytorch(model: nn.Module, ids: np.ndarray, steps: int) -> float:
    loader = iter(DataLoader(RandomWindows(ids), batch_size=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        for _ in range(steps):
            model.train()
            loss = model(next(loader), return_loss=True)
            loss.backward()
            print(f"training loss: {loss.item()}")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin


def gpt2_chinese(model: nn.Module, ids: np.ndarray, steps: int, folder: Path) -> float:
    from transformers import get_linear_schedule_with_warmup

    path = folder / "tokenized_train_0.txt"
    path.write_text(" ".join(map(str, ids)), encoding="utf-8")
    writer = SummaryWriter(str(folder / "gpt2 curves"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model.train()
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        tokens = [int(word) for word in path.read_text(encoding="utf-8").strip().split()]
        samples = [tokens[first : first + TOKENS] for first in range(0, len(tokens) - TOKENS, TOKENS)]
        random.shuffle(samples)
        running = 0.0
        for step in range(steps):
            batch = torch.tensor([[int(token) for token in samples[step % len(samples)]]]).long()
            loss = model(input_ids=batch, labels=batch)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            running += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if (step + 1) % LOG_STEP == 0:
                writer.add_scalar("loss", running / LOG_STEP, step)
                print(f"step {step + 1}, loss {running / LOG_STEP}")
                running = 0.0
        seconds = time.perf_counter() - begin
    writer.close()
    return seconds


def measure(corpus: Path, steps: int, peer_steps: int, repetitions: int, contenders: list[str]) -> dict[str, Any]:
    from reformer_pytorch import ReformerLM
    from reformer_pytorch.generative_tools import TrainingWrapper
    from transformers import GPT2Config, GPT2LMHeadModel

    from reformer_lm.text import encode_articles, load_tokenizer

    tokenizer = load_tokenizer()
    articles = json.loads(corpus.read_text(encoding="utf-8"))
    ids = np.concatenate([np.asarray(article) for article in encode_articles(tokenizer, articles)])
    ids = ids[: (max(steps, peer_steps) + 1) * TOKENS]
    config = our_model(tokenizer).config
    width, depth, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    rfp = TrainingWrapper(
        ReformerLM(
            num_tokens=len(tokenizer), dim=width, depth=depth, heads=heads, dim_head=width // heads, max_seq_len=TOKENS,
            bucket_size=config.bucket_size, n_hashes=config.num_hashes, causal=True,
        )
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=TOKENS, n_embd=width, n_layer=depth, n_head=heads, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    counts = {name: steps if name in ("bare", "ours") else peer_steps for name in contenders}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    shares: list[float] = []

    def watched(seconds: tuple[float, float]) -> float:
        whole, of_the_model = seconds
        shares.append(1 - of_the_model / whole)
        return whole

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls: dict[str, Callable[[int], float]] = {
            "bare": lambda count: bare(our_model(tokenizer), ids, count),
            "ours": lambda count: watched(ours(our_model(tokenizer), ids, count, tokenizer, folder)),
            "reformer_pytorch": lambda count: reformer_pytorch(rfp, ids, count),
            "gpt2_chinese": lambda count: gpt2_chinese(gpt2, ids, count, folder),
        }
        calls = {name: call for name, call in calls.items() if name in contenders}
        for call in calls.values():
            call(2)
        shares.clear()
        names = list(calls)
        for repetition in range(repetitions):
            first = repetition % len(names)
            for contender in names[first:] + names[:first]:
                seconds = calls[contender](counts[contender])
                taken[contender].append(seconds)
                print(f"{LABELS[contender]}: {counts[contender] * TOKENS / seconds:,.0f} tokens/s", flush=True)
    return {
        "tokens": TOKENS, "hidden_size": width, "depth": depth, "heads": heads, "vocab_size": len(tokenizer),
        "share_of_the_loop": shares,
        "contenders": {
            name: {"steps": count, "seconds": taken[name], "tokens_per_s": [count * TOKENS / s for s in taken[name]]}
            for name, count in counts.items()
        },
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Markdown table."""
    entries = results["contenders"]
    medians = {name: statistics.median(entry["tokens_per_s"]) for name, entry in entries.items()}
    lines = ["| | tokens/s | of the bare step |", "|---|---:|---:|"]
    for name, entry in entries.items():
        speeds = entry["tokens_per_s"]
        share = medians[name] / medians["bare"]
        spread = f"{medians[name]:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        lines.append(f"| {LABELS[name]} | {spread} | {share:.3f} |")
    shares = results["share_of_the_loop"]
    lines.append(
        f"\nOf our loop's time {statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}) is neither "
        "forward nor backward pass, clipping nor update."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a JSON list of articles")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--peer_steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--out", type=Path, default=default_result_file("training", "cpu"))
    parser.add_argument("--report", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    if arguments.corpus is None:
        raise SystemExit("error: give a JSON list of articles with --corpus")
    measured = measure(
        arguments.corpus, arguments.steps, arguments.peer_steps, arguments.repetitions, arguments.contenders
    )
    results = {"machine": describe_machine(), **measured}
    arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
