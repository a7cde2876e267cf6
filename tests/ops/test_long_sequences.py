"""A million tokens: indices, memory and exact causality hold there too."""

from __future__ import annotations

import math

import pytest
import torch

from reformer_lm.ops.hashing import factorize_buckets, hash_vectors, sample_rotations
from reformer_lm.ops.keys import normalize_keys
from reformer_lm.ops.lsh import lsh_attention

TOKENS = 1 << 20
WINDOW = 64


@pytest.mark.slow
def test_a_million_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    qk, v, grad_out = (torch.randn(1, 2, TOKENS, 16, generator=generator) for _ in range(3))
    buckets = hash_vectors(qk, sample_rotations(2, 16, 2, factorize_buckets(TOKENS // WINDOW), seed=0))
    qk.requires_grad_()
    v.requires_grad_()
    out = lsh_attention(qk, v, buckets, window=WINDOW, num_shifted_heads=1)
    grad_qk, grad_v = torch.autograd.grad(out, (qk, v), grad_out)
    assert all(bool(x.isfinite().all()) for x in (out, grad_qk, grad_v))

    # The same tokens without those behind them.
    cut = 5_000
    prefix = [x.detach()[:, :, :cut] for x in (qk, v)]
    alone = lsh_attention(*prefix, buckets[..., :cut], window=WINDOW, num_shifted_heads=1)
    torch.testing.assert_close(out[:, :, :cut], alone, rtol=0, atol=1e-5)

    # The last tokens, by the definition.
    with torch.no_grad():
        keys = normalize_keys(qk, "rms")
        for head in range(2):
            for t in range(TOKENS - 20, TOKENS):
                seen = []
                for r in range(2):
                    same = (buckets[0, head, r, :t] == buckets[0, head, r, t]).nonzero().flatten()
                    seen.append(same[-WINDOW:])
                places = torch.cat(seen)
                weights = torch.softmax(keys[0, head, places] @ qk[0, head, t] / math.sqrt(16), dim=0)
                expected = weights @ v[0, head, places + head]
                torch.testing.assert_close(out[0, head, t], expected, rtol=0, atol=1e-5)

    # Each row of weights sums to 1, so what reaches the values of a plain head is what came in.
    sums = [x.detach()[0, 0].double().sum(dim=0) for x in (grad_v, grad_out)]
    torch.testing.assert_close(*sums, rtol=0, atol=1e-2)
