"""How far the gradients of the reversible stack are from plain autograd's: `python benchmarks/gradient_error.py`.

Whole models of 12 layers; the relative error is |g - g'| / |g'| over all parameters together. Beside it, in bfloat16
autocast, how far either is from float32, which is what the precision costs anyway. Writes
benchmarks/results/gradient_error.json.
"""

from __future__ import annotations

import json

import torch
from machine import RESULTS, describe_machine
from torch import Tensor

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

SIZES = {
    "vocab_size": 5000, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4,
    "max_position_embeddings": 2048, "bucket_size": 64,
}  # fmt: skip


def gradients(reversible: str, bf16: bool, tokens: int, seed: int) -> Tensor:
    """All gradients of one step in a row."""
    torch.manual_seed(seed)
    model = ReformerLMForCausalLM(ReformerLMConfig(**SIZES, reversible=reversible)).train()
    batch = torch.randint(SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(batch, labels=batch).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main() -> None:
    """Measures three seeds and writes the result file."""
    tokens = SIZES["max_position_embeddings"]
    rows = []
    for seed in range(3):
        exact = gradients("off", False, tokens, seed)
        row: dict[str, float] = {"seed": seed}
        for bf16 in (False, True):
            plain = exact if not bf16 else gradients("off", True, tokens, seed)
            error = (gradients("full", bf16, tokens, seed) - plain).norm() / plain.norm()
            row["bfloat16" if bf16 else "float32"] = float(error)
            if bf16:
                row["bfloat16_plain_against_float32"] = float((plain - exact).norm() / exact.norm())
        print(row)
        rows.append(row)
    results = {"machine": describe_machine(), "model": SIZES, "tokens": tokens, "relative_errors": rows}
    path = RESULTS / "gradient_error.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
