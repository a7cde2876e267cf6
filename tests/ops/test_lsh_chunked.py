"""Chunked LSH attention against dense matrices, outputs and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops import chunked_lsh_attention, lsh_chunked
from reformer_lm.ops.keys import normalize_keys
from reformer_lm.ops.lsh_reference import chunked_lsh_attention_reference

TIGHT = {"rtol": 0.0, "atol": 1e-10}


def met_by_round(buckets: Tensor, chunk_size: int, same_bucket: bool) -> tuple[Tensor, Tensor]:
    """How often query t meets key s in round r, and in how many rounds they stand side by side.

    ``buckets`` is [R, T]. Returns [R, T, T] and [T, T].
    """
    rounds, tokens = buckets.shape
    padded = tokens + -tokens % chunk_size
    chunks = []
    for r, of_round in enumerate(buckets.tolist()):
        order = sorted(range(tokens), key=lambda t, names=of_round: (names[t], t)) + [-1] * (padded - tokens)
        chunks += [(r, order[begin : begin + chunk_size]) for begin in range(0, padded, chunk_size)]
    met = torch.zeros(rounds, tokens, tokens, dtype=torch.float64)
    side_by_side = torch.zeros(rounds, tokens, tokens, dtype=torch.bool)
    for index, (r, queries) in enumerate(chunks):
        before = chunks[index - 1] if len(chunks) > 1 else (r, [])
        for other, keys in ((r, queries), before):
            rows = torch.tensor([t for t in queries if t >= 0], dtype=torch.long).unsqueeze(1)
            columns = torch.tensor([s for s in keys if s >= 0], dtype=torch.long)
            alike = (buckets[r, rows] == buckets[r, columns]) & (r == other)
            counts = alike if same_bucket else torch.ones_like(alike)
            met[r, rows, columns] += counts.double()
            side_by_side[r, rows, columns] |= counts & (r == other)
    return met, side_by_side.sum(dim=0)


def visible_pairs(
    tokens: int,
    own: int,
    causal: bool,
    shifted: bool,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Which of T keys each of the t queries may see besides itself: bool [t, T], of one row of the batch."""

    rows, columns = torch.arange(own).unsqueeze(1), torch.arange(tokens)
    sees = columns <= rows if causal else torch.ones(own, tokens, dtype=torch.bool)
    sees = sees.clone()
    if attention_mask is not None:
        sees[:, :own] &= attention_mask
    if documents is not None:
        sees[:, :own] &= documents.unsqueeze(1) == documents
    sees[:, own:] = True
    if mask is not None:
        sees &= mask[:own].unsqueeze(1) & mask
    visible = sees & (rows != columns)
    if shifted:
        # The value behind a match must be one that may be read, or the query's own.
        readable = sees | (rows == columns)
        visible[:, : own - 1] &= readable[:, 1:own]
    return visible


def dense(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    *,
    chunk_size: int,
    key_norm: str = "unit",
    causal: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicates: bool = True,
    num_shifted_heads: int = 0,
    mask_BT: Tensor | None = None,
    attention_mask_BTT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """One softmax over everything that a token meets in any round."""
    batch, heads, tokens, dim = qk.shape
    own = tokens if num_queries is None else num_queries
    logits = qk[:, :, :own] @ normalize_keys(qk, key_norm).transpose(-1, -2) / math.sqrt(dim)
    rows = []
    for b in range(batch):
        attention_mask = None
        if attention_mask_BTT is not None:
            attention_mask = attention_mask_BTT[b if len(attention_mask_BTT) > 1 else 0]
        for h in range(heads):
            shifted = h >= heads - num_shifted_heads
            visible = visible_pairs(
                tokens,
                own,
                causal,
                shifted,
                None if mask_BT is None else mask_BT[b],
                attention_mask,
                None if documents_BT is None else documents_BT[b],
            )
            met, counts = met_by_round(buckets[b, h], chunk_size, not attend_across_buckets)
            times = met.sum(dim=0)[:own] * visible
            if not allow_duplicates:
                times = times / (counts[:own].double() + 1e-9)
            alone = (times == 0).all(dim=-1, keepdim=True)
            weights = torch.softmax((logits[b, h] + times.log()).masked_fill(alone, 0.0), dim=-1)
            values, itself = v[b, h], v[b, h, :own]
            if shifted:
                values = torch.cat((values[1:own], torch.zeros_like(values[:1]), values[own:]))
                itself = torch.zeros_like(itself)
            rows.append(torch.where(alone, itself, weights @ values))
    return torch.stack(rows).unflatten(0, (batch, heads))


def make_inputs(
    batch: int, heads: int, tokens: int, dim: int, rounds: int, buckets: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Longer than usual queries: a flat softmax would hide a wrong mask.
    qk = 2.0 * torch.randn(batch, heads, tokens, dim, dtype=torch.float64, generator=generator)
    v = torch.randn(batch, heads, tokens, dim + 1, dtype=torch.float64, generator=generator)
    hashed = torch.randint(0, buckets, (batch, heads, rounds, tokens), generator=generator, dtype=torch.int16)
    return qk.requires_grad_(), v.requires_grad_(), hashed


def random_bools(*shape: int, seed: int, share: float = 0.75) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def outputs_and_gradients(attend: Any, qk: Tensor, v: Tensor, buckets: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out = attend(qk, v, buckets, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    # The added nothing makes gradients 0 that would be missing.
    return out, *torch.autograd.grad(out + 0.0 * (qk.sum() + v.sum()), (qk, v), weights)


def assert_dense(inputs: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    expected = outputs_and_gradients(dense, *inputs, **options)
    actual = outputs_and_gradients(chunked_lsh_attention, *inputs, **options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 40), st.integers(41, 120)),
    dim=st.sampled_from([1, 3, 8]),
    rounds=st.integers(1, 4),
    chunk_size=st.sampled_from([1, 2, 3, 8, 13, 64]),
    buckets=st.sampled_from([1, 2, 6, 20]),
    key_norm=st.sampled_from(["rms", "unit"]),
    causal=st.booleans(),
    across=st.booleans(),
    duplicates=st.booleans(),
    shifted=st.integers(0, 3),
    extras=st.integers(0, 20),
    masks=st.sets(st.sampled_from(["padding", "attention", "attention for all rows", "documents"])),
    sliced=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_one_dense_softmax(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    rounds: int,
    chunk_size: int,
    buckets: int,
    key_norm: str,
    causal: bool,
    across: bool,
    duplicates: bool,
    shifted: int,
    extras: int,
    masks: set[str],
    sliced: bool,
    seed: int,
) -> None:
    if tokens > 40:
        batch, heads, rounds = 1, min(heads, 2), min(rounds, 2)
    own = max(1, tokens - extras)
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "key_norm": key_norm,
        "causal": causal,
        "attend_across_buckets": across,
        "allow_duplicates": duplicates,
        "num_shifted_heads": min(shifted, heads) if causal else 0,
        "num_queries": None if own == tokens else own,
    }
    if "padding" in masks:
        options["mask_BT"] = random_bools(batch, tokens, seed=seed)
    if "attention" in masks:
        options["attention_mask_BTT"] = random_bools(batch, own, own, seed=seed + 1)
    elif "attention for all rows" in masks:
        options["attention_mask_BTT"] = random_bools(1, own, own, seed=seed + 1)
    if "documents" in masks:
        # In pieces, too: only the numbers count here.
        options["documents_BT"] = random_bools(batch, own, seed=seed + 2, share=0.2).cumsum(dim=1) % 3
    with pytest.MonkeyPatch.context() as patch:
        if sliced:
            patch.setattr(lsh_chunked, "_MAX_LOGITS", 1)
        assert_dense(make_inputs(batch, heads, tokens, dim, rounds, buckets, seed), **options)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("attention_rows", [0, 1, 2])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("own", [15, 21])
def test_every_combination_of_masks(padding: bool, attention_rows: int, documents: bool, own: int) -> None:
    options: dict[str, Any] = {"chunk_size": 5, "num_shifted_heads": 1, "num_queries": own}
    if padding:
        options["mask_BT"] = random_bools(2, 21, seed=0)
    if attention_rows:
        options["attention_mask_BTT"] = random_bools(attention_rows, own, own, seed=1)
    if documents:
        options["documents_BT"] = random_bools(2, own, seed=2, share=0.2).cumsum(dim=1) % 3
    assert_dense(make_inputs(2, 2, 21, 3, 2, 2, seed=3), **options)


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("rounds", [1, 2])
def test_few_chunks(tokens: int, rounds: int, duplicates: bool) -> None:
    # One chunk has none before it; of two each stands before the other.
    for shifted in (0, 1):
        options = {"chunk_size": 8, "allow_duplicates": duplicates, "num_shifted_heads": shifted}
        assert_dense(make_inputs(1, 2, tokens, 4, rounds, 3, seed=tokens), **options)


@pytest.mark.parametrize("shifted", [0, 1])
def test_a_token_that_sees_nothing_reads_itself_or_nothing(shifted: int) -> None:
    qk, v, buckets = make_inputs(1, 1, 12, 4, 2, 3, seed=0)
    nothing = torch.zeros(1, 12, 12, dtype=torch.bool)
    alone = torch.arange(12).unsqueeze(0)
    for options in ({"attention_mask_BTT": nothing}, {"documents_BT": alone}, {"mask_BT": nothing[:, 0]}):
        out = chunked_lsh_attention(qk, v, buckets, chunk_size=4, num_shifted_heads=shifted, **options)
        torch.testing.assert_close(out, torch.zeros_like(v) if shifted else v, **TIGHT)


def test_documents_and_hidden_values_do_not_reach_each_other() -> None:
    qk, v, buckets = make_inputs(1, 3, 40, 4, 3, 2, seed=1)
    documents = torch.tensor([[0] * 17 + [1] * 23])
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 30:] = False
    out = chunked_lsh_attention(qk, v, buckets, chunk_size=4, num_shifted_heads=2, documents_BT=documents, mask_BT=mask)
    for visible, hidden in ((slice(17), slice(17, None)), (slice(17, 30), slice(17)), (slice(17, 30), slice(30, None))):
        (gradient,) = torch.autograd.grad(out[:, :, visible].sum(), v, retain_graph=True)
        assert (gradient[:, :, hidden] == 0).all()
        assert (gradient[:, :, visible] != 0).any()


def test_slices_make_no_difference_and_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 3, 45, 4, 2, 4, seed=2)
    options = {"chunk_size": 8, "num_shifted_heads": 1, "mask_BT": random_bools(2, 45, seed=3)}
    expected = outputs_and_gradients(chunked_lsh_attention, *inputs, **options)
    calls = []
    attend = lsh_chunked._attend
    monkeypatch.setattr(lsh_chunked, "_attend", lambda *given: (calls.append(given[1].shape[0]), attend(*given))[1])
    # A row has 2 * 48 * 16 logits.
    for limit, rows in ((1, [1] * 6), (4 * 2 * 48 * 16, [4, 2]), (1 << 26, [6])):
        monkeypatch.setattr(lsh_chunked, "_MAX_LOGITS", limit)
        calls.clear()
        with torch.no_grad():
            out = chunked_lsh_attention(*inputs, **options)
        assert calls == rows
        torch.testing.assert_close(out, expected[0], **TIGHT)
        for one, other in zip(outputs_and_gradients(chunked_lsh_attention, *inputs, **options), expected, strict=True):
            torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("limit", [1, 1 << 26])
def test_gradcheck_with_attention_dropout(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsh_chunked, "_MAX_LOGITS", limit)
    qk, v, buckets = make_inputs(1, 2, 7, 2, 2, 4, seed=4)

    def attend(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return chunked_lsh_attention(a, b, buckets, chunk_size=4, dropout_p=0.4, num_shifted_heads=1)

    assert torch.autograd.gradcheck(attend, (qk, v), atol=1e-6)


def test_dropout_keeps_the_mean_and_differs_between_calls() -> None:
    qk, v, buckets = make_inputs(1, 1, 12, 4, 2, 2, seed=5)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = chunked_lsh_attention(qk, v, buckets, chunk_size=4)
        samples = torch.stack([chunked_lsh_attention(qk, v, buckets, chunk_size=4, dropout_p=0.3) for _ in range(500)])
    assert not torch.equal(samples[0], samples[1])
    error = samples.std(dim=0) / 500**0.5
    assert ((samples.mean(dim=0) - plain).abs() < 6 * error + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_close_to_float64(dtype: torch.dtype) -> None:
    qk, v, buckets = make_inputs(1, 2, 150, 16, 3, 4, seed=6)
    options = {"chunk_size": 16, "num_shifted_heads": 1, "allow_duplicates": False, "attend_across_buckets": False}
    expected = outputs_and_gradients(chunked_lsh_attention, qk, v, buckets, **options)
    low = [x.detach().to(dtype).requires_grad_() for x in (qk, v)]
    actual = outputs_and_gradients(chunked_lsh_attention, *low, buckets, **options)
    bound = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < bound


@pytest.mark.parametrize("limit", [1, 1 << 26])
def test_no_uninitialised_memory_is_read(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.empty filled with NaN: whatever is not written before it is read shows.
    empty_like, empty = torch.empty_like, torch.empty

    def poisoned_like(*args: object, **kwargs: object) -> Tensor:
        made = empty_like(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(torch.nan)
        return made

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(torch.nan)
        return made

    monkeypatch.setattr(lsh_chunked, "_MAX_LOGITS", limit)
    inputs = make_inputs(1, 2, 37, 4, 2, 4, seed=8)
    options = {
        "chunk_size": 8,
        "num_shifted_heads": 1,
        "num_queries": 30,
        "mask_BT": random_bools(1, 37, seed=0),
        "attention_mask_BTT": random_bools(1, 30, 30, seed=1),
        "documents_BT": torch.arange(30).unsqueeze(0) // 12,
        "allow_duplicates": False,
    }
    expected = outputs_and_gradients(chunked_lsh_attention, *inputs, **options)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    monkeypatch.setattr(torch, "empty", poisoned)
    actual = outputs_and_gradients(chunked_lsh_attention, *inputs, **options)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_non_contiguous_inputs() -> None:
    qk, v, buckets = make_inputs(2, 3, 20, 4, 2, 4, seed=10)
    expected = chunked_lsh_attention(qk, v, buckets, chunk_size=8)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (qk, v)]
    torch.testing.assert_close(chunked_lsh_attention(*strided, buckets, chunk_size=8), expected, **TIGHT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must lie between 1 and the 8 vectors"),
        ({"num_queries": 9}, "num_queries must lie between 1 and the 8 vectors"),
        ({"num_shifted_heads": 3}, "num_shifted_heads must lie between 0 and the 2 heads"),
        ({"num_shifted_heads": 1, "causal": False}, "num_shifted_heads=1 needs causal=True"),
        ({"mask_BT": torch.ones(1, 7, dtype=torch.bool)}, "mask_BT must be bool"),
        ({"mask_BT": torch.ones(1, 8)}, "mask_BT must be bool"),
        ({"attention_mask_BTT": torch.ones(1, 8, 7, dtype=torch.bool)}, "attention_mask_BTT must be bool"),
        ({"attention_mask_BTT": torch.ones(1, 8, 8, dtype=torch.bool), "num_queries": 6}, "attention_mask_BTT must"),
        ({"documents_BT": torch.zeros(1, 8)}, "documents_BT must be integers"),
        ({"documents_BT": torch.zeros(1, 8, dtype=torch.long), "num_queries": 6}, "documents_BT must be integers"),
        ({"key_norm": "l1"}, "key_norm must be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    qk, v, buckets = make_inputs(1, 2, 8, 4, 2, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        chunked_lsh_attention(qk, v, buckets, **{"chunk_size": 4} | options)


def test_wrong_shapes_are_named() -> None:
    qk, v, buckets = make_inputs(1, 2, 8, 4, 2, 2, seed=0)
    with pytest.raises(ValueError, match="expected qk"):
        chunked_lsh_attention(qk[0], v, buckets, chunk_size=4)
    with pytest.raises(ValueError, match="expected qk"):
        chunked_lsh_attention(qk, v[:, :1], buckets, chunk_size=4)
    with pytest.raises(ValueError, match="buckets must be"):
        chunked_lsh_attention(qk, v, buckets[:, :, :, :7], chunk_size=4)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([1, 4]),
    rounds=st.integers(1, 3),
    chunk_size=st.sampled_from([1, 2, 5, 16, 64]),
    buckets=st.sampled_from([2, 6]),
    key_norm=st.sampled_from(["rms", "unit"]),
    causal=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_oracle_of_one_query_at_a_time(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    rounds: int,
    chunk_size: int,
    buckets: int,
    key_norm: str,
    causal: bool,
    masked: bool,
    seed: int,
) -> None:
    inputs = make_inputs(batch, heads, tokens, dim, rounds, buckets, seed)
    options: dict[str, Any] = {"chunk_size": chunk_size, "key_norm": key_norm, "causal": causal}
    if masked:
        options["mask_BT"] = random_bools(batch, tokens, seed=seed)
    expected = outputs_and_gradients(chunked_lsh_attention_reference, *inputs, **options)
    actual = outputs_and_gradients(chunked_lsh_attention, *inputs, **options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
