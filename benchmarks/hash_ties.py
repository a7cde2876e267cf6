"""How often a hash falls differently in a run of another shape, and what it does to the perplexity.

`python benchmarks/hash_ties.py [--model_dir model/]`, after `make demo`. The same tokens go through the model
alone, as prefixes of round and of odd lengths, as one of three rows, and on one thread; buckets and log-likelihoods are
compared with the first run. Writes benchmarks/results/hash_ties.json, which docs/lsh_attention.md quotes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe_machine
from torch import Tensor

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.corpus import read_articles
from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.text import encode_articles, load_tokenizer

RESULT = ROOT / "benchmarks" / "results" / "hash_ties.json"
WINDOW = 4096


@torch.no_grad()
def run(model: ReformerLMForCausalLM, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Buckets of every layer [B, H, R, T], and the negative log-likelihood of each token but the first [B, T - 1]."""
    buckets: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: buckets.append(output[1]))
        for module in model.modules()
        if isinstance(module, LSHSelfAttention)
    ]
    try:
        log_probabilities = torch.log_softmax(model(tokens).logits[:, :-1].double(), dim=-1)
    finally:
        for hook in hooks:
            hook.remove()
    return buckets, -log_probabilities.gather(2, tokens[:, 1:, None]).squeeze(2)


def compare(model: ReformerLMForCausalLM, windows: list[Tensor], other: str) -> dict[str, Any]:
    """Runs each window twice, the second time in the shape that ``other`` names."""
    decisions = flips = moved = counted = 0
    largest = total = total_other = 0.0
    for window in windows:
        buckets, losses = run(model, window[None])
        row, length = 0, len(window)
        if other.startswith("prefix of "):
            length = int(other.removeprefix("prefix of "))
            again, losses_again = run(model, window[None, :length])
        elif other == "second of three rows":
            row = 1
            again, losses_again = run(model, torch.stack([window.flip(0), window, window.roll(7)]))
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            again, losses_again = run(model, window[None])
            torch.set_num_threads(threads)
        for one, two in zip(buckets, again, strict=True):
            decisions += two[row].numel()
            flips += int((one[0, ..., :length] != two[row]).sum())
        one, two = losses[0, : length - 1], losses_again[row]
        difference = (one - two).abs()
        largest = max(largest, float(difference.max()))
        moved += int((difference > 1e-4).sum())
        counted += difference.numel()
        total, total_other = total + float(one.sum()), total_other + float(two.sum())
    return {
        "shape": other,
        "hash_decisions": decisions,
        "decisions_that_fell_differently": flips,
        "tokens": counted,
        "tokens_moved_by_more_than_1e-4_nats": moved,
        "largest_move_nats": largest,
        "ppl": torch.tensor(total / counted).exp().item(),
        "relative_difference_of_ppl": abs(total - total_other) / counted,
    }


def main() -> None:
    """Measures in float32 and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=ROOT / "model")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model_dir)
    model = ReformerLMForCausalLM.from_pretrained(arguments.model_dir).eval()
    texts = [text for name in ("val", "train") for text in read_articles(ROOT / "data" / f"{name}.json")]
    stream = torch.tensor([token for article in encode_articles(tokenizer, texts) for token in article])
    windows = [window for window in stream.split(WINDOW) if len(window) == WINDOW]
    shapes = ("prefix of 3072", "prefix of 3001", "prefix of 777", "second of three rows", "one thread")
    results = {"machine": describe_machine(), "float32": [compare(model, windows, shape) for shape in shapes]}
    RESULT.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(results["float32"], indent=2))


if __name__ == "__main__":
    main()
