"""What makes `score()` fast: the same sentences with one of its ways taken away at a time, and what bounds it.

`measure_ways` is the part "ways" of scoring.py. Everything runs in rounds of rotating order. The bound is the time that
the model's linear layers alone need for the rows that they are given: nothing else is computed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from machine import ROOT
from torch import Tensor, nn

# Label, patches of module attributes, options of score(), number format of the weights.
Way = tuple[str, dict[str, Any], dict[str, Any], torch.dtype]

_SORTED = {"reformer_lm.ops.lsh.MAX_TOKENS": 0}
_TORCHS_PRODUCTS = {"reformer_lm.layers.linear._HAS_ONEDNN": False}
_ONE_BATCH = {"reformer_lm.scoring.threads.MOST_BATCHES_AT_A_TIME": 1}
_PADDED_TO_16 = {"reformer_lm.scoring.batches.padded_length": lambda length: -(-length // 16) * 16}
WAYS: dict[str, Way] = {
    "as_it_is": ("`score()`", {}, {}, torch.float32),
    "sorted": ("attention of short texts sorted by bucket, like that of long ones", _SORTED, {}, torch.float32),
    "torchs_products": ("torch's own matrix products in place of oneDNN's", _TORCHS_PRODUCTS, {}, torch.float32),
    "padded_to_16": ("padded to multiples of 16 in place of 4", _PADDED_TO_16, {}, torch.float32),
    "one_batch": ("one batch at a time, on all threads, in place of one a thread", _ONE_BATCH, {}, torch.float32),
    "none_of_these": (
        "all four of these",
        {**_SORTED, **_TORCHS_PRODUCTS, **_PADDED_TO_16, **_ONE_BATCH},
        {},
        torch.float32,
    ),
    "tokens_1024": ("1,024 tokens a pass in place of 4,096", {}, {"batch_tokens": 1024}, torch.float32),
    "tokens_16384": ("16,384 tokens a pass", {}, {"batch_tokens": 16384}, torch.float32),
    "one_by_one": ("one text a pass", {}, {"batch_size": 1}, torch.float32),
    "bfloat16": ("weights in bfloat16", {}, {}, torch.bfloat16),
}
BOUNDS = {
    "products": ("the matrix products alone", torch.float32),
    "products_bfloat16": ("the matrix products alone, bfloat16", torch.bfloat16),
}


def our_model(tokenizer: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of configs/tiny.json for texts of up to 1,024 tokens, untrained."""
    from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

    settings = json.loads((ROOT / "configs" / "tiny.json").read_text(encoding="utf-8"))["model"]
    torch.manual_seed(0)
    config = ReformerLMConfig(**{**settings, "vocab_size": len(tokenizer), "max_position_embeddings": 1024})
    return ReformerLMForCausalLM(config).to(dtype).eval()


@contextmanager
def patched(attributes: dict[str, Any]) -> Iterator[None]:
    """With other values for some attributes of modules."""
    with ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(mock.patch(name, value))
        yield


def products_alone(model: nn.Module, scoring: Callable[[], object]) -> Callable[[], None]:
    """What a call does to the linear layers of a model, to be done again without the rest."""
    from reformer_lm.scoring.forward import evaluation

    calls: list[tuple[nn.Module, Tensor]] = []
    inputs: dict[torch.Size, Tensor] = {}

    def record(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        shape = given[0].shape
        calls.append((layer, inputs.setdefault(shape, torch.randn(shape).to(given[0].dtype))))

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, nn.Linear)]
    scoring()
    for hook in hooks:
        hook.remove()

    def again() -> None:
        with evaluation(model):
            for layer, given in calls:
                layer(given)

    return again


def way_calls(tokenizer: Any, sentences: list[str]) -> dict[str, Callable[[], object]]:
    """What is to be timed."""
    from reformer_lm.scoring import score

    models = {dtype: our_model(tokenizer, dtype) for dtype in (torch.float32, torch.bfloat16)}

    def call(way: Way) -> Callable[[], None]:
        _, patches, options, dtype = way

        def run() -> None:
            with patched(patches):
                score(models[dtype], tokenizer, sentences, **options)

        return run

    calls: dict[str, Callable[[], object]] = {name: call(way) for name, way in WAYS.items()}
    for name, (_, dtype) in BOUNDS.items():
        model = models[dtype]
        calls[name] = products_alone(model, lambda model=model: score(model, tokenizer, sentences))
    return calls


def measure_ways(tokenizer: Any, sentences: list[str], repetitions: int) -> dict[str, Any]:
    """Sentences a second with each way."""
    calls = way_calls(tokenizer, sentences)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            calls[name]()
            rates[name].append(len(sentences) / (time.perf_counter() - begin))
            print(f"{name}: {rates[name][-1]:,.1f} sentences/s", flush=True)
    return {"sentences": len(sentences), "per_second": rates}


def ways_table(found: dict[str, Any]) -> str:
    """Markdown."""
    rates = found["per_second"]
    own = statistics.median(rates["as_it_is"])
    lines = ["| | sentences/s | of `score()` |", "|---|---:|---:|"]
    for name, values in rates.items():
        label = WAYS[name][0] if name in WAYS else BOUNDS[name][0]
        middle = statistics.median(values)
        lines.append(f"| {label} | {middle:,.1f} ({min(values):,.1f} to {max(values):,.1f}) | {middle / own:.2f} |")
    return "\n".join(lines)
