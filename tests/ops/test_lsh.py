"""Exactly causal LSH attention against its oracle, outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops import lsh_blocks, lsh_dense, lsh_slice, lsh_torch
from reformer_lm.ops.hashing import hash_vectors, sample_rotations
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.lsh import lsh_attention

TIGHT = {"rtol": 0.0, "atol": 1e-11}


def make_inputs(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    rounds: int,
    buckets: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qk, v = (torch.randn(batch, heads, tokens, dim, dtype=dtype, generator=generator) for _ in range(2))
    hashed = hash_vectors(qk, sample_rotations(heads, dim, rounds, (buckets,), seed))
    return qk.requires_grad_(), v.requires_grad_(), hashed


def outputs_and_gradients(qk: Tensor, v: Tensor, buckets: Tensor, **options: object) -> tuple[Tensor, ...]:
    out = lsh_attention(qk, v, buckets, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    inputs = (qk, v, *options.get("memory", ()))
    # The added nothing makes gradients 0 that would be missing, as those of the query of a token without matches.
    return out, *torch.autograd.grad(out + 0.0 * sum(x.sum() for x in inputs), inputs, weights)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 40), st.integers(41, 300)),
    dim=st.sampled_from([1, 4, 9]),
    rounds=st.integers(1, 4),
    window=st.sampled_from([1, 2, 5, 16, 64, 400]),
    buckets=st.sampled_from([2, 4, 10]),
    key_norm=st.sampled_from(["rms", "unit"]),
    shifted=st.integers(0, 3),
    block=st.sampled_from([1, 4, 64]),
    group=st.sampled_from([1, 1 << 19]),
    duplicates=st.booleans(),
    documents=st.integers(1, 4),
    memory=st.integers(0, 3),
    own_memory=st.booleans(),
    masked_memory=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_torch_backend_equals_the_reference(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    rounds: int,
    window: int,
    buckets: int,
    key_norm: str,
    shifted: int,
    block: int,
    group: int,
    duplicates: bool,
    documents: int,
    memory: int,
    own_memory: bool,
    masked_memory: bool,
    seed: int,
) -> None:
    if tokens > 100:
        batch, heads, rounds = 1, 1, min(rounds, 2)
    inputs = make_inputs(batch, heads, tokens, dim, rounds, buckets, seed)
    options = {"window": window, "key_norm": key_norm, "num_shifted_heads": min(shifted, heads)}
    options["allow_duplicates"] = duplicates
    generator = torch.Generator().manual_seed(seed)
    if documents > 1:
        cuts = torch.randint(0, documents, (batch, tokens), generator=generator)
        options["documents_BT"] = cuts.sort(dim=1).values
    if memory:
        sizes = (batch, heads, memory, dim) if own_memory else (heads, memory, dim)
        if masked_memory:
            # Rows that see nothing of it, too.
            options["memory_mask_BM"] = torch.rand(batch, memory, generator=generator) < 0.5
        options["memory"] = tuple(
            torch.randn(sizes, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
        )
    expected = outputs_and_gradients(*inputs, **options, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh_blocks, "QUERIES_PER_BLOCK", block)
        patch.setitem(lsh_slice._LOGIT_ELEMENTS, "cpu", group)
        actual = outputs_and_gradients(*inputs, **options, backend="torch")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 20), st.integers(21, 90)),
    dim=st.sampled_from([1, 4, 9]),
    rounds=st.integers(1, 4),
    window=st.sampled_from([1, 2, 5, 16, 64, 400]),
    buckets=st.sampled_from([2, 4, 40]),
    key_norm=st.sampled_from(["rms", "rms_eps", "unit"]),
    shifted=st.integers(0, 3),
    pairs=st.sampled_from([1, 1000, 1 << 22]),
    duplicates=st.booleans(),
    documents=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_dense_backend_equals_the_reference(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    rounds: int,
    window: int,
    buckets: int,
    key_norm: str,
    shifted: int,
    pairs: int,
    duplicates: bool,
    documents: int,
    seed: int,
) -> None:
    inputs = make_inputs(batch, heads, tokens, dim, rounds, buckets, seed)
    options = {"window": window, "key_norm": key_norm, "num_shifted_heads": min(shifted, heads)}
    options["allow_duplicates"] = duplicates
    if documents > 1:
        cuts = torch.randint(0, documents, (batch, tokens), generator=torch.Generator().manual_seed(seed))
        options["documents_BT"] = cuts.sort(dim=1).values
    expected = outputs_and_gradients(*inputs, **options, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh_dense, "_PAIRS", pairs)
        actual = outputs_and_gradients(*inputs, **options, backend="dense")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("tokens", [1, lsh_dense.MAX_TOKENS, lsh_dense.MAX_TOKENS + 1])
def test_short_and_long_sequences_attend_alike(tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    inputs = make_inputs(2, 2, tokens, 4, 2, 8, seed=0)
    with caplog.at_level("DEBUG", logger="reformer_lm.ops.lsh"):
        automatic = outputs_and_gradients(*inputs, window=16, num_shifted_heads=1)
    assert f"backend {'dense' if tokens <= lsh_dense.MAX_TOKENS else 'torch'}" in caplog.text
    for name in ("dense", "torch"):
        named = outputs_and_gradients(*inputs, window=16, num_shifted_heads=1, backend=name)
        for one, other in zip(automatic, named, strict=True):
            torch.testing.assert_close(one, other, **TIGHT)


def test_no_later_token_reaches_an_earlier_one_whatever_the_backend() -> None:
    qk, v, buckets = make_inputs(1, 2, 50, 4, 2, 4, seed=1)
    # A shifted head without a match must not read what follows it.
    spoiled = v.detach().clone()
    spoiled[:, :, 30:] = 1e300
    for backend in ("dense", "torch"):
        out, other = (
            lsh_attention(qk, x, buckets, window=8, num_shifted_heads=2, backend=backend) for x in (v, spoiled)
        )
        assert torch.equal(out[:, :, :30], other[:, :, :30])


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("shifted", [0, 2])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_all_tokens_in_one_bucket(tokens: int, shifted: int, backend: str) -> None:
    qk, v, buckets = make_inputs(1, 2, tokens, 4, 2, 2, seed=0)
    buckets = torch.zeros_like(buckets)
    options = {"window": 8, "num_shifted_heads": shifted}
    for one, other in zip(
        outputs_and_gradients(qk, v, buckets, **options, backend=backend),
        outputs_and_gradients(qk, v, buckets, **options, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_every_token_in_a_bucket_of_its_own_reads_itself_or_nothing(backend: str) -> None:
    qk, v, _ = make_inputs(1, 2, 30, 4, 3, 2, seed=1)
    buckets = torch.arange(30).expand(1, 2, 3, 30)
    out, grad_qk, _ = outputs_and_gradients(qk, v, buckets, window=8, num_shifted_heads=1, backend=backend)
    assert torch.equal(out[:, 0], v[:, 0])
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    # What the softmax of one logit leaves in its gradient is rounding, if anything.
    torch.testing.assert_close(grad_qk, torch.zeros_like(grad_qk), **TIGHT)


@pytest.mark.parametrize("slice_elements", [1, 200, 1 << 19])
def test_slices_of_heads_make_no_difference(slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 3, 45, 4, 2, 4, seed=2)
    expected = outputs_and_gradients(*inputs, window=8, backend="torch")
    monkeypatch.setitem(lsh_torch._SLICE_ELEMENTS, "cpu", slice_elements)
    for one, other in zip(outputs_and_gradients(*inputs, window=8, backend="torch"), expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


def test_gradcheck_in_float64() -> None:
    qk, v, buckets = make_inputs(1, 2, 11, 3, 2, 4, seed=3)
    for shifted, backend in itertools.product((0, 1), ("dense", "torch")):
        options = {"window": 4, "num_shifted_heads": shifted, "backend": backend}
        assert torch.autograd.gradcheck(
            lambda a, b, options=options: lsh_attention(a, b, buckets, **options), (qk, v), atol=1e-6
        )


def test_gradcheck_with_attention_dropout() -> None:
    qk, v, buckets = make_inputs(1, 2, 11, 3, 2, 4, seed=4)

    def attend(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return lsh_attention(a, b, buckets, window=4, dropout_p=0.4)

    assert torch.autograd.gradcheck(attend, (qk, v), atol=1e-6)


def test_dropout_keeps_the_mean_and_differs_between_calls() -> None:
    qk, v, buckets = make_inputs(1, 1, 12, 4, 2, 2, seed=5, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = lsh_attention(qk, v, buckets, window=4)
        samples = torch.stack([lsh_attention(qk, v, buckets, window=4, dropout_p=0.3) for _ in range(3000)])
    assert not torch.equal(samples[0], samples[1])
    error = samples.std(dim=0) / 3000**0.5
    assert ((samples.mean(dim=0) - plain).abs() < 6 * error + 1e-5).all()


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_close_to_float64(dtype: torch.dtype, backend: str) -> None:
    qk, v, buckets = make_inputs(1, 2, 150, 16, 3, 4, seed=6)
    expected = outputs_and_gradients(qk, v, buckets, window=16, num_shifted_heads=1, backend=backend)
    low = [x.detach().to(dtype).requires_grad_() for x in (qk, v)]
    actual = outputs_and_gradients(*low, buckets, window=16, num_shifted_heads=1, backend=backend)
    bound = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < bound


def test_no_uninitialised_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.empty filled with NaN: whatever is not written before it is read shows.
    empty_like, empty = torch.empty_like, torch.empty

    def poisoned_like(*args: object, **kwargs: object) -> Tensor:
        made = empty_like(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    inputs = make_inputs(1, 2, 37, 4, 2, 4, seed=8)
    expected = outputs_and_gradients(*inputs, window=8, backend="torch")
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    monkeypatch.setattr(torch, "empty", poisoned)
    for one, other in zip(outputs_and_gradients(*inputs, window=8, backend="torch"), expected, strict=True):
        assert torch.equal(one, other)


def test_non_contiguous_inputs() -> None:
    qk, v, buckets = make_inputs(2, 3, 20, 4, 2, 4, seed=9)
    expected = lsh_attention(qk, v, buckets, window=8)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (qk, v)]
    torch.testing.assert_close(lsh_attention(*strided, buckets, window=8), expected, **TIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_shifted_heads": 1},
        {"dropout_p": 0.3},
        {"allow_duplicates": False},
        {"documents_BT": torch.tensor([[0] * 20 + [1] * 17] * 2)},
        {"memory": (torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 2, 8, dtype=torch.float64))},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_what_was_kept_is_not_computed_again(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    # So many buckets that some tokens find nothing.
    qk, v, buckets = make_inputs(2, 3, 37, 8, 2, 40, seed=0)
    options = {**options, "window": 5, "kept": KeptAttention()}
    if "memory" in options:
        options["memory"] = tuple(x.requires_grad_() for x in options["memory"])
    torch.manual_seed(1)
    first = outputs_and_gradients(qk, v, buckets, **options)
    after = torch.get_rng_state()
    assert options["kept"].is_filled
    monkeypatch.setattr(lsh_slice.Slice, "forward", None)
    torch.manual_seed(1)
    for one, other in zip(outputs_and_gradients(qk, v, buckets, **options), first, strict=True):
        assert torch.equal(one, other)
    # What draws random numbers afterwards draws the same.
    assert torch.equal(torch.get_rng_state(), after)


def test_the_chosen_backend_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    qk, v, buckets = make_inputs(1, 2, 8, 4, 2, 2, seed=0)
    with caplog.at_level("DEBUG", logger="reformer_lm.ops.lsh"):
        lsh_attention(qk, v, buckets, window=4)
    assert "lsh_attention on cpu: backend dense, since flex needs tensors on a CUDA device" in caplog.text


def test_wrong_arguments_are_named() -> None:
    qk, v, buckets = make_inputs(1, 2, 8, 4, 2, 2, seed=0)
    with pytest.raises(ValueError, match="window must be at least 1"):
        lsh_attention(qk, v, buckets, window=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        lsh_attention(qk, v, buckets, window=4, backend="triton")
    with pytest.raises(ValueError, match="disagree"):
        lsh_attention(qk, v[:, :1], buckets, window=4)
    with pytest.raises(ValueError, match="expected qk"):
        lsh_attention(qk[0], v, buckets, window=4)
    with pytest.raises(ValueError, match="num_shifted_heads"):
        lsh_attention(qk, v, buckets, window=4, num_shifted_heads=3)
    with pytest.raises(ValueError, match="documents must be integers"):
        lsh_attention(qk, v, buckets, window=4, documents_BT=torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="memory must be vectors"):
        lsh_attention(qk, v, buckets, window=4, memory=(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)))
    with pytest.raises(ValueError, match='backend="flex" needs tensors on a CUDA device'):
        lsh_attention(qk, v, buckets, window=4, backend="flex")
    with pytest.raises(ValueError, match="no dropout"):
        lsh_attention(qk, v, buckets, window=4, dropout_p=0.1, backend="reference")
    with pytest.raises(ValueError, match="neither dropout nor memory"):
        lsh_attention(qk, v, buckets, window=4, dropout_p=0.1, backend="dense")
