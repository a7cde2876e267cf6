"""Attention against reformer-pytorch's own classes, given its rotations: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reformer_lm import ReformerLMConfig
from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops import chunked_lsh_attention, hash_vectors, shared_qk_attention

# A token that meets only itself has the logit -5e4 in every round. They take exp(l - logsumexp(l)) of it, which in
# float64 is off by up to 7e-12 of the output; a softmax is not.
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def random_inputs(batch: int, heads: int, tokens: int, dim: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    # Longer than usual queries: a flat softmax would hide a wrong mask.
    return [(3.0 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_() for _ in range(2)]


def random_mask(batch: int, tokens: int, seed: int) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.7


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor], counts: Tensor | None = None) -> None:
    """Outputs and gradients of ``inputs``, only where ``counts`` [B, T] is True."""
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    if counts is not None:
        where = counts[:, None, :, None] if expected.dim() == 4 else counts[:, :, None]
        actual, expected, weights = (torch.where(where, x, 0.0) for x in (actual, expected, weights))
    torch.testing.assert_close(actual, expected, **TIGHT)
    found, wanted = (torch.autograd.grad(out, inputs, weights, retain_graph=True) for out in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 4, 7]),
    rounds=st.integers(1, 4),
    bucket_size=st.sampled_from([1, 2, 3, 5, 8]),
    pairs_of_chunks=st.integers(1, 4),
    causal=st.booleans(),
    across=st.booleans(),
    duplicates=st.booleans(),
    extras=st.integers(0, 12),
    masks=st.sets(st.sampled_from(["padding", "attention"])),
    seed=st.integers(0, 2**31),
)
def test_lsh_attention(
    peer: ModuleType,
    recorder: Any,
    double_by_default: None,
    batch: int,
    heads: int,
    dim: int,
    rounds: int,
    bucket_size: int,
    pairs_of_chunks: int,
    causal: bool,
    across: bool,
    duplicates: bool,
    extras: int,
    masks: set[str],
    seed: int,
) -> None:
    tokens = 2 * bucket_size * pairs_of_chunks
    # Learned memory and a context stand behind the sequence's own tokens.
    own = max(1, tokens - extras)
    qk, v = random_inputs(batch, heads, tokens, dim, seed)
    mask = random_mask(batch, tokens, seed) if "padding" in masks else None
    attention_mask = random_mask(batch * own, own, seed + 1).view(batch, own, own) if "attention" in masks else None
    theirs = peer.LSHAttention(
        bucket_size=bucket_size,
        n_hashes=rounds,
        causal=causal,
        attend_across_buckets=across,
        allow_duplicate_attention=duplicates,
    ).double()
    torch.manual_seed(seed)
    expected, _, their_buckets = theirs(
        qk.flatten(0, 1),
        v.flatten(0, 1),
        query_len=own,
        input_mask=None if mask is None else mask.repeat_interleave(heads, dim=0),
        input_attn_mask=None if attention_mask is None else attention_mask.repeat_interleave(heads, dim=0),
    )
    (rotations,) = recorder.take()
    buckets = hash_vectors(qk, (rotations,))
    num_buckets = tokens // bucket_size
    # They number the buckets of all rounds through.
    their_buckets = their_buckets.view(batch, heads, rounds, tokens) - num_buckets * torch.arange(rounds).view(-1, 1)
    assert torch.equal(buckets.long(), their_buckets)
    actual = chunked_lsh_attention(
        qk,
        v,
        buckets,
        chunk_size=bucket_size,
        key_norm="unit",
        causal=causal,
        attend_across_buckets=across,
        allow_duplicates=duplicates,
        mask_BT=mask,
        attention_mask_BTT=attention_mask,
        num_queries=own,
    )
    # Masked positions too: what they become decides where the next layer sorts them.
    assert_same(actual, expected.view_as(actual), [qk, v])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_all_tokens_in_one_bucket(peer: ModuleType, recorder: Any, causal: bool, across: bool) -> None:
    # The first chunk of a round looks back to the last one of the round before: same bucket number, other round.
    qk, v = random_inputs(1, 1, 16, 4, 0)
    with torch.no_grad():
        qk.copy_(qk[:, :, :1] * torch.linspace(1, 2, 16, dtype=torch.float64).view(-1, 1))
    torch.manual_seed(0)
    theirs = peer.LSHAttention(bucket_size=4, n_hashes=8, causal=causal, attend_across_buckets=across)
    expected, _, _ = theirs(qk[0], v[0])
    buckets = hash_vectors(qk, tuple(recorder.take()))
    assert (buckets == buckets[..., :1]).all()
    # Neighbouring rounds of the same number are what this is about.
    assert (buckets[:, :, 1:] == buckets[:, :, :-1]).any()
    actual = chunked_lsh_attention(qk, v, buckets, chunk_size=4, causal=causal, attend_across_buckets=across)
    assert_same(actual, expected.view_as(actual), [qk, v])


def test_zero_vectors_hash_alike(peer: ModuleType, recorder: Any) -> None:
    theirs = peer.LSHAttention(bucket_size=4, n_hashes=2, causal=True)
    zeros = torch.zeros(1, 1, 16, 4, dtype=torch.float64)
    their_buckets = theirs.hash_vectors(4, zeros[0])
    buckets = hash_vectors(zeros, tuple(recorder.take()))
    assert torch.equal(buckets.long(), their_buckets.view(1, 1, 2, 16) - torch.tensor([[0], [4]]))


@pytest.mark.parametrize("heads", [1, 3])
def test_rotations_of_each_head(peer: ModuleType, recorder: Any, heads: int) -> None:
    # With this option they also draw new ones for each row of the batch, so one row it is.
    qk, v = random_inputs(1, heads, 24, 5, 0)
    theirs = peer.LSHAttention(bucket_size=4, n_hashes=2, causal=True, random_rotations_per_head=True)
    expected, _, _ = theirs(qk[0], v[0])
    (rotations,) = recorder.take()
    assert rotations.shape == (heads, 5, 2, 3)
    actual = chunked_lsh_attention(qk, v, hash_vectors(qk, (rotations,)), chunk_size=4)
    assert_same(actual, expected.view_as(actual), [qk, v])


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("extras", [0, 1, 5, 50])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masks", [(), ("padding",), ("attention",), ("padding", "attention")], ids=str)
def test_full_attention(peer: ModuleType, tokens: int, extras: int, causal: bool, masks: tuple[str, ...]) -> None:
    qk, v = random_inputs(2, 3, tokens + extras, 5, tokens)
    mask = random_mask(2, tokens + extras, 7) if "padding" in masks else None
    attention_mask = random_mask(2 * tokens, tokens, 8).view(2, tokens, tokens) if "attention" in masks else None
    expected, _, _ = peer.FullQKAttention(causal=causal)(
        qk.flatten(0, 1),
        v.flatten(0, 1),
        query_len=tokens,
        input_mask=None if mask is None else mask.repeat_interleave(3, dim=0),
        input_attn_mask=None if attention_mask is None else attention_mask.repeat_interleave(3, dim=0),
    )
    # Where a token sees nothing at all, not even itself, theirs is the mean of everything; ours reads itself.
    sees = torch.ones(2, tokens, tokens + extras, dtype=torch.bool)
    if causal:
        sees[:, :, :tokens] = sees[:, :, :tokens].tril()
    if attention_mask is not None:
        sees[:, :, :tokens] &= attention_mask
    if mask is not None:
        sees &= mask[:, :tokens, None] & mask[:, None, :]
    counts = sees.any(dim=-1)
    assert counts.any() or tokens == 1
    actual = shared_qk_attention(
        qk[:, :, :tokens],
        v[:, :, :tokens],
        key_norm="unit",
        causal=causal,
        mask_BT=None if mask is None else mask[:, :tokens],
        attention_mask_BTT=attention_mask,
        extra=(qk[:, :, tokens:], v[:, :, tokens:]),
        extra_mask_BE=None if mask is None else mask[:, tokens:],
    )
    # The added nothing makes the gradient 0, not missing, where one token reads itself whatever its query.
    assert_same(actual + 0.0 * qk.sum(), expected.view_as(actual), [qk, v], counts)


def make_attention_pair(
    peer: ModuleType, copy: Callable[[nn.Module, nn.Module], None], **options: Any
) -> tuple[nn.Module, LSHSelfAttention]:
    options = {"heads": 5, "bucket_size": 3, "n_hashes": 2, "dim_head": 4, "full_attn_thres": 0} | options
    torch.manual_seed(0)
    theirs = peer.LSHSelfAttention(9, causal=True, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter))
    config = ReformerLMConfig(
        vocab_size=2,
        hidden_size=9,
        num_attention_heads=options["heads"],
        head_dim=options["dim_head"],
        bucket_size=options["bucket_size"],
        num_hashes=options["n_hashes"],
        max_position_embeddings=48,
        full_attention_threshold=options["full_attn_thres"],
        lsh_mask="chunked",
        key_norm="unit",
        num_local_heads=options.get("n_local_attn_heads", 0),
        local_keys="shared",
        local_rotary=False,
        num_shifted_heads=0,
        num_mem_kv=options.get("num_mem_kv", 0),
        attend_across_buckets=options.get("attend_across_buckets", True),
        allow_duplicate_attention=options.get("allow_duplicate_attention", True),
    )
    ours = LSHSelfAttention(config, 0).double()
    copy(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("local_heads", [0, 1, 4])
@pytest.mark.parametrize("tokens", [6, 12, 48])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_with_local_heads(
    peer: ModuleType,
    recorder: Any,
    copy: Any,
    assert_same_module: Any,
    set_rotations: Any,
    local_heads: int,
    tokens: int,
    masked: bool,
) -> None:
    theirs, ours = make_attention_pair(peer, copy, n_local_attn_heads=local_heads)
    x = torch.randn(2, tokens, 9, dtype=torch.float64).requires_grad_()
    mask = random_mask(2, tokens, 3) if masked else None
    expected = theirs(x, input_mask=mask)
    (rotations,) = recorder.take()
    set_rotations(ours, rotations)
    actual, _ = ours(x, SequenceInfo(torch.arange(tokens).unsqueeze(0), mask))
    assert_same_module((theirs, ours), (expected, actual), TIGHT, x, mask)


@pytest.mark.parametrize("tokens", [1, 2, 11, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_of_short_sequences_is_full(
    peer: ModuleType, recorder: Any, copy: Any, assert_same_module: Any, tokens: int, masked: bool
) -> None:
    theirs, ours = make_attention_pair(peer, copy, full_attn_thres=20)
    x = torch.randn(2, tokens, 9, dtype=torch.float64).requires_grad_()
    mask = random_mask(2, tokens, 4) if masked else None
    expected = theirs(x, input_mask=mask)
    assert not recorder.take()
    actual, (replay,) = ours(x, SequenceInfo(torch.arange(tokens).unsqueeze(0), mask))
    assert replay.buckets is None
    assert_same_module((theirs, ours), (expected, actual), TIGHT, x, mask)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_mem_kv": 6},
        {"num_mem_kv": 2, "n_local_attn_heads": 2},
        {"num_mem_kv": 2, "allow_duplicate_attention": False},
        {"num_mem_kv": 2, "allow_duplicate_attention": False, "attend_across_buckets": False},
        {"num_mem_kv": 0, "attend_across_buckets": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", [(), ("padding",), ("context",), ("padding", "context", "attention")], ids=str)
def test_self_attention_with_memory_and_context(
    peer: ModuleType,
    recorder: Any,
    copy: Any,
    assert_same_module: Any,
    set_rotations: Any,
    double_by_default: None,
    options: dict[str, Any],
    masks: tuple[str, ...],
    full: bool,
) -> None:
    theirs, ours = make_attention_pair(peer, copy, full_attn_thres=100 if full else 0, **options)
    x = torch.randn(2, 18, 9).requires_grad_()
    # As many as fill the last pair of chunks.
    length = 12 - options["num_mem_kv"]
    mask = random_mask(2, 18, 5) if "padding" in masks else None
    context_mask = random_mask(2, length, 6) if "context" in masks else None
    attention_mask = random_mask(36, 18, 7).view(2, 18, 18) if "attention" in masks else None

    def context() -> Tensor:
        # Made of the input, so that its gradient is checked with it.
        return x[:, :length].flip(1).square()

    expected = theirs(x, keys=context(), input_mask=mask, context_mask=context_mask, input_attn_mask=attention_mask)
    rotations = recorder.take()
    assert len(rotations) == (0 if full else 1)
    for drawn in rotations:
        set_rotations(ours, drawn)
    info = SequenceInfo(
        torch.arange(18).unsqueeze(0),
        mask=mask,
        attention_mask=attention_mask,
        context=context(),
        context_mask=context_mask,
    )
    actual, _ = ours(x, info)
    assert_same_module((theirs, ours), (expected, actual), TIGHT, x, mask)


@pytest.mark.parametrize("across", [True, False])
def test_duplicates_count_once(peer: ModuleType, recorder: Any, double_by_default: None, across: bool) -> None:
    # One bucket in every round: each pair of a chunk and the one before it is met three times.
    qk, v = random_inputs(1, 1, 16, 4, 0)
    theirs = peer.LSHAttention(
        bucket_size=8, n_hashes=3, causal=True, attend_across_buckets=across, allow_duplicate_attention=False
    )
    expected, _, _ = theirs(qk[0], v[0])
    buckets = hash_vectors(qk, tuple(recorder.take()))
    outs = [
        chunked_lsh_attention(qk, v, buckets, chunk_size=8, attend_across_buckets=across, allow_duplicates=allowed)
        for allowed in (False, True)
    ]
    assert_same(outs[0], expected.view_as(outs[0]), [qk, v])
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [1, 5, 7, 31])
def test_lengths_that_they_pad(
    peer: ModuleType, recorder: Any, copy: Any, assert_same_module: Any, set_rotations: Any, tokens: int
) -> None:
    # Their Autopadder appends zero vectors, which take part in the sorting. Given the same zeros we agree; we do
    # not add them ourselves, so that at these lengths chunks are cut elsewhere.
    from reformer_pytorch import Autopadder

    theirs, ours = make_attention_pair(peer, copy, n_local_attn_heads=2)
    x = torch.randn(2, tokens, 9, dtype=torch.float64).requires_grad_()
    expected = Autopadder(theirs)(x)
    set_rotations(ours, *recorder.take())
    padded = nn.functional.pad(x, (0, 0, 0, -tokens % 6))
    length = padded.shape[1]
    mask = torch.arange(length).expand(2, -1) < tokens
    actual, _ = ours(padded, SequenceInfo(torch.arange(length).unsqueeze(0), mask))
    assert_same_module((theirs, ours), (expected, actual[:, :tokens]), TIGHT, x)
