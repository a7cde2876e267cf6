"""The contenders of benchmarks/attention.py: one causal attention call each, forward and backward, on the same numbers.

Each starts from projected per-head tensors that lie in memory as that contender wants them (making them is not timed)
and ends with its output and the gradients of its inputs. All have 8 heads of 64, batch 1; the three LSH contenders
have 4 hashes, buckets of 64 tokens and as many of them as tokens / 64, and hash and sort within the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS = 8
HEAD_DIM = 64
HASHES = 4
BUCKET_SIZE = 64
# reformer-pytorch takes whole pairs of chunks.
LENGTH_MULTIPLE = 2 * BUCKET_SIZE
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Call = Callable[[], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """What every contender is given, each [1, H, T, D]. Where queries and keys are shared, they are ``q``."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


def make_inputs(tokens: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Standard normal numbers: random directions, so that buckets come out about equally full.

    Args:
        tokens: T, a multiple of 128.
        dtype: of all four tensors; drawn in float32, so that bfloat16 gets the same numbers rounded.
        device: where they lie.
        seed: of a generator of their own.

    Raises:
        ValueError: ``tokens`` is not a positive multiple of 128.
    """
    if tokens < 1 or tokens % LENGTH_MULTIPLE:
        raise ValueError(
            f"length {tokens} does not fit every contender: reformer-pytorch needs a multiple of {LENGTH_MULTIPLE} "
            "(two buckets); choose such a length"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, tokens, HEAD_DIM)
    return Inputs(*(torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4)))


def bucket_factors(tokens: int) -> tuple[int, ...]:
    """Numbers of buckets of the hashes whose pairs make up tokens / 64 buckets, rounded up to even."""
    from reformer_lm.ops.hashing import factorize_buckets

    num_buckets = -(-tokens // BUCKET_SIZE)
    return factorize_buckets(num_buckets + num_buckets % 2)


def ours_in_steps(inputs: Inputs) -> tuple[Callable[[], Tensor], Callable[[Tensor], tuple[Tensor, ...]]]:
    """Our call in its two parts, for the profile: hashing, and attention (sorting, forward, backward) given buckets."""
    from reformer_lm.ops import hash_vectors, lsh_attention, sample_rotations

    qk, v = _leaves(inputs.q, inputs.v)
    rotations = sample_rotations(HEADS, HEAD_DIM, HASHES, bucket_factors(qk.shape[2]), seed=0)
    # In a model they stay on the device.
    rotations = tuple(rotation.to(qk.device) for rotation in rotations)

    def attend(buckets: Tensor) -> tuple[Tensor, ...]:
        out = lsh_attention(qk, v, buckets, window=BUCKET_SIZE, backend="auto")
        return out, *torch.autograd.grad(out, (qk, v), inputs.grad_out)

    return lambda: hash_vectors(qk, rotations), attend


def _ours(inputs: Inputs) -> Call:
    hash_step, attend = ours_in_steps(inputs)
    return lambda: attend(hash_step())


def _reformer_pytorch(inputs: Inputs) -> Call:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    attention = LSHAttention(bucket_size=BUCKET_SIZE, n_hashes=HASHES, causal=True).to(inputs.q.device).train()
    # It takes heads as rows of the batch: [H, T, D].
    qk, v = _leaves(inputs.q.squeeze(0), inputs.v.squeeze(0))
    grad_out = inputs.grad_out.squeeze(0)

    def call() -> tuple[Tensor, ...]:
        out, _, _ = attention(qk, v)
        return out, *torch.autograd.grad(out, (qk, v), grad_out)

    return call


class _Given(nn.Module):
    """In place of a projection: returns what was already projected."""

    def __init__(self, projected: Tensor) -> None:
        super().__init__()
        self.projected = projected

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.projected


def _transformers(inputs: Inputs) -> Call:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    tokens = inputs.q.shape[2]
    factors = bucket_factors(tokens)
    config = ReformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        num_hashes=HASHES,
        # One number, or a list where there are too many for one rotation.
        num_buckets=factors[0] if len(factors) == 1 else list(factors),
        lsh_attn_chunk_length=BUCKET_SIZE,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        max_position_embeddings=tokens,
        is_decoder=True,
        hash_seed=None,
    )
    attention = LSHSelfAttention(config, layer_idx=0).to(inputs.q.device, inputs.q.dtype).train()
    # The module projects hidden states [B, T, H * D] itself and splits the heads as a view. Its two projections are
    # replaced by what they would return, two separate tensors in just that layout. Within the call it still joins the
    # heads of the output, one copy of [T, H * D], which the others leave to their caller.
    qk, v = _leaves(*(_join_heads(x) for x in (inputs.q, inputs.v)))
    attention.query_key, attention.value = _Given(qk), _Given(v)
    grad_out = _join_heads(inputs.grad_out)

    def call() -> tuple[Tensor, ...]:
        out = attention(qk).hidden_states
        return out, *torch.autograd.grad(out, (qk, v), grad_out)

    return call


def _sdpa(inputs: Inputs) -> Call:
    q, k, v = _leaves(inputs.q, inputs.k, inputs.v)

    def call() -> tuple[Tensor, ...]:
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), inputs.grad_out)

    return call


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as inputs of a graph of their own."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def _join_heads(x_BHTD: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D], contiguous."""
    return x_BHTD.transpose(1, 2).flatten(2)


class Contender(NamedTuple):
    """One way to attend.

    Attributes:
        label: its name in tables and plots.
        work: what a call is, for the result file.
        module: what must be importable for it.
        package: the distribution that brings it.
        build: makes the call from inputs; building is not timed.
    """

    label: str
    work: str
    module: str
    package: str
    build: Callable[[Inputs], Call]


CONTENDERS: dict[str, Contender] = {
    "ours": Contender(
        "ours",
        'hash_vectors with fixed rotations, then lsh_attention(window=64, backend="auto"); gradients of qk and v',
        "reformer_lm.ops",
        "reformer_lm",
        _ours,
    ),
    "reformer_pytorch": Contender(
        "reformer-pytorch",
        "LSHAttention(bucket_size=64, n_hashes=4, causal=True) on [8, T, 64]; gradients of qk and v",
        "reformer_pytorch.reformer_pytorch",
        "reformer-pytorch",
        _reformer_pytorch,
    ),
    "transformers": Contender(
        "transformers' Reformer",
        "LSHSelfAttention(is_decoder=True, chunk length 64, one chunk before, 4 hashes, as many buckets as ours) on "
        "[1, T, 512], its two projections replaced by tensors already projected; gradients of qk and v",
        "transformers.models.reformer.modeling_reformer",
        "transformers",
        _transformers,
    ),
    "sdpa": Contender(
        "full attention (SDPA)",
        "torch.nn.functional.scaled_dot_product_attention(is_causal=True); gradients of q, k and v",
        "torch",
        "torch",
        _sdpa,
    ),
}


def why_missing(name: str) -> str | None:
    """None if the contender can run here, else what is missing."""
    contender = CONTENDERS[name]
    try:
        importlib.import_module(contender.module)
    except ImportError as error:
        return f"{contender.package} is not installed or lacks {contender.module} ({error})"
    return None
