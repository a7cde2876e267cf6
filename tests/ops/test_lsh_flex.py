"""LSH attention through FlexAttention, as far as it can be had without a GPU.

FlexAttention has no backward pass on the CPU, nor a compiled forward pass that returns the logsumexp. What surrounds
its one call (sorting, merge, backward pass) is tested here with a dense equivalent in its place, against the oracle in
float64. `test_lsh_flex_blocks.py` has the call itself, `tests/test_cuda.py` the kernels.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops import lsh_flex, lsh_flex_blocks
from reformer_lm.ops.hashing import hash_vectors, sample_rotations, sort_by_bucket
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.keys import shift_values
from reformer_lm.ops.lsh_flex import flex_obstacle, lsh_attention_flex
from reformer_lm.ops.lsh_flex_blocks import BlockLists
from reformer_lm.ops.lsh_reference import lsh_attention_reference

TIGHT = {"rtol": 0.0, "atol": 1e-10}


def dense_mask(lowest: Tensor) -> Tensor:
    """Which place sees which, bool [P, P], said differently from the code: its lowest and on, or nothing but itself."""
    place = torch.arange(lowest.shape[0])
    query, key = place.unsqueeze(1), place
    first = lowest.long().unsqueeze(1)
    return ((first <= key) & (key < query)) | ((first == query) & (key == query))


def dense_round(inputs: tuple[Tensor, ...], lowest: Tensor, block_lists: BlockLists) -> tuple[Tensor, Tensor]:
    """What `_attend_round` computes, with all P x P logits and a graph."""
    q, keys, values = inputs
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ keys.T).to(wide) / math.sqrt(q.shape[1])
    logits = logits.masked_fill(~dense_mask(lowest), -math.inf)
    return torch.softmax(logits, dim=-1).to(values.dtype) @ values, torch.logsumexp(logits, dim=-1)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense equivalent in place of FlexAttention, in small blocks, so that a short sequence has several."""
    monkeypatch.setattr(lsh_flex, "_attend_round", dense_round)
    monkeypatch.setattr(lsh_flex_blocks, "BLOCK", 16)


def make_inputs(
    batch: int, heads: int, tokens: int, dim: int, rounds: int, buckets: int, seed: int, value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qk, v = (
        torch.randn(batch, heads, tokens, size, dtype=torch.float64, generator=generator)
        for size in (dim, value_dim or dim)
    )
    hashed = hash_vectors(qk, sample_rotations(heads, dim, rounds, (buckets,), seed))
    return qk.requires_grad_(), v.requires_grad_(), hashed


def attend(qk: Tensor, v: Tensor, buckets: Tensor, *, window: int, key_norm: str = "rms", shifted: int = 0) -> Tensor:
    """`lsh_attention_flex` and what its caller adds: tokens without a match read themselves, or nothing."""
    order = sort_by_bucket(buckets)
    out = lsh_attention_flex(qk, shift_values(v, shifted), order, window=window, key_norm=key_norm)
    has_match = order.start < torch.arange(order.start.shape[-1])
    matched = has_match.gather(-1, order.inverse).any(dim=-2).unsqueeze(-1)
    own = v * (torch.arange(v.shape[1]) < v.shape[1] - shifted).view(1, -1, 1, 1)
    return torch.where(matched, out, own)


def gradients(out: Tensor, qk: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).sin().to(out.dtype)
    # The added nothing makes gradients 0 that would be missing, as those of the query of a token without matches.
    return torch.autograd.grad(out + 0.0 * (qk.sum() + v.sum()), (qk, v), weights)


def assert_equals_the_reference(
    qk: Tensor, v: Tensor, buckets: Tensor, *, window: int, key_norm: str = "rms", shifted: int = 0
) -> None:
    out = attend(qk, v, buckets, window=window, key_norm=key_norm, shifted=shifted)
    expected = lsh_attention_reference(
        qk, v, buckets, window=window, key_norm=key_norm, num_shifted_heads=shifted
    )  # fmt: skip
    for one, other in zip((out, *gradients(out, qk, v)), (expected, *gradients(expected, qk, v)), strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    tokens=st.one_of(st.integers(1, 150), st.sampled_from([127, 128, 129, 256, 257])),
    dims=st.sampled_from([(4, 4), (1, 3), (9, 2)]),
    rounds=st.integers(1, 4),
    window=st.sampled_from([1, 2, 5, 64, 127, 128, 129, 400]),
    buckets=st.sampled_from([2, 4, 10]),
    key_norm=st.sampled_from(["rms", "unit"]),
    shifted=st.integers(0, 2),
    block=st.sampled_from([1, 16, 128]),
    slice_elements=st.sampled_from([1, 1 << 26]),
    seed=st.integers(0, 2**31),
)
def test_merge_and_gradients_equal_the_reference(
    batch: int,
    heads: int,
    tokens: int,
    dims: tuple[int, int],
    rounds: int,
    window: int,
    buckets: int,
    key_norm: str,
    shifted: int,
    block: int,
    slice_elements: int,
    seed: int,
) -> None:
    if tokens > 60:
        batch, heads, rounds = 1, 1, min(rounds, 2)
    inputs = make_inputs(batch, heads, tokens, dims[0], rounds, buckets, seed, dims[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh_flex, "_attend_round", dense_round)
        patch.setattr(lsh_flex_blocks, "BLOCK", block)
        patch.setattr(lsh_flex, "_SLICE_ELEMENTS", slice_elements)
        assert_equals_the_reference(*inputs, window=window, key_norm=key_norm, shifted=min(shifted, heads))


@pytest.mark.parametrize("window", [7, 300])
def test_every_odd_length(window: int, dense: None) -> None:
    for tokens in range(1, 151, 2):
        inputs = make_inputs(1, 1, tokens, 3, 2, 4, seed=tokens)
        assert_equals_the_reference(*inputs, window=window)


@pytest.mark.parametrize("shifted", [0, 2])
@pytest.mark.parametrize("window", [8, 33, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33])
def test_all_tokens_in_one_bucket(tokens: int, window: int, shifted: int, dense: None) -> None:
    qk, v, buckets = make_inputs(1, 2, tokens, 4, 2, 2, seed=0)
    assert_equals_the_reference(qk, v, torch.zeros_like(buckets), window=window, shifted=shifted)


@pytest.mark.parametrize("tokens", [1, 15, 16, 40])
def test_every_token_in_a_bucket_of_its_own(tokens: int, dense: None) -> None:
    qk, v, _ = make_inputs(1, 2, tokens, 4, 3, 2, seed=1)
    buckets = torch.arange(tokens).expand(1, 2, 3, tokens)
    out = lsh_attention_flex(qk, v, sort_by_bucket(buckets), window=8, key_norm="rms")
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out, (qk, v), torch.zeros_like(out)):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert_equals_the_reference(qk, v, buckets, window=8, shifted=1)


def test_gradcheck_in_float64(dense: None) -> None:
    qk, v, buckets = make_inputs(1, 2, 11, 3, 2, 4, seed=3)
    for shifted in (0, 1):
        assert torch.autograd.gradcheck(
            lambda a, b, n=shifted: attend(a, b, buckets, window=4, shifted=n), (qk, v), atol=1e-6
        )


def test_places_alone_in_a_round_harm_nothing_when_their_logits_are_huge(dense: None) -> None:
    # Even tokens meet in round 0, odd ones never, and where a token is alone exp(its logit with itself) overflows.
    qk, v, _ = make_inputs(1, 1, 20, 4, 2, 2, seed=4)
    token = torch.arange(20)
    buckets = torch.stack((torch.where(token % 2 == 0, 0, token), token)).view(1, 1, 2, 20)
    # Vectors that nearly agree, so that their logits, about 400, differ by little.
    low = [x.detach().float().requires_grad_() for x in (200.0 + 5.0 * qk, v)]
    high = [x.detach().double().requires_grad_() for x in low]
    out = attend(*low, buckets, window=3)
    expected = lsh_attention_reference(*high, buckets, window=3)
    for one, other in zip((out, *gradients(out, *low)), (expected, *gradients(expected, *high)), strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_close_to_float64(dtype: torch.dtype, dense: None) -> None:
    qk, v, buckets = make_inputs(1, 2, 150, 16, 3, 4, seed=6)
    low = [x.detach().to(dtype).requires_grad_() for x in (qk, v)]
    high = [x.detach().double().requires_grad_() for x in low]
    out = attend(*low, buckets, window=16, shifted=1)
    expected = lsh_attention_reference(*high, buckets, window=16, num_shifted_heads=1)
    bound = {torch.bfloat16: 0.02, torch.float16: 0.002, torch.float32: 2e-6}[dtype]
    for one, other in zip((out, *gradients(out, *low)), (expected, *gradients(expected, *high)), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < bound


def test_autocast_changes_nothing(dense: None) -> None:
    qk, v, buckets = make_inputs(1, 2, 40, 8, 2, 4, seed=7)
    low = [x.detach().float().requires_grad_() for x in (qk, v)]
    expected = attend(*low, buckets, window=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*low, buckets, window=8)
    assert torch.equal(out, expected)
    grads = gradients(expected, *low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(out, *low)
    for one, other in zip(inside, grads, strict=True):
        assert torch.equal(one, other)


def test_no_uninitialised_memory_is_read(dense: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.empty filled with NaN: whatever is not written before it is read shows.
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoning(*args: object, **kwargs: object) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-1)

        return poisoning

    qk, v, buckets = make_inputs(1, 2, 37, 4, 2, 4, seed=8)
    expected = attend(qk, v, buckets, window=8)
    expected_gradients = gradients(expected, qk, v)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    out = attend(qk, v, buckets, window=8)
    assert torch.equal(out, expected)
    for one, other in zip(gradients(out, qk, v), expected_gradients, strict=True):
        assert torch.equal(one, other)


def test_non_contiguous_inputs(dense: None) -> None:
    qk, v, buckets = make_inputs(2, 3, 20, 4, 2, 4, seed=9)
    expected = attend(qk, v, buckets, window=8)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (qk, v)]
    out = attend(*strided, buckets, window=8)
    assert torch.equal(out, expected)
    for one, other in zip(gradients(out, *strided), gradients(expected, qk, v), strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_for_the_backward_pass(dense: None) -> None:
    qk, v, buckets = make_inputs(1, 2, 150, 16, 3, 4, seed=10)
    low = [x.detach().bfloat16().requires_grad_() for x in (qk, v)]
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lsh_attention_flex(*low, sort_by_bucket(buckets), window=16, key_norm="rms")
    token_bytes = sum(x.numel() * x.element_size() for x in saved) / (2 * 150)
    # qk, v and the output in bfloat16, the logsumexp in float32, order and start of three rounds in int32.
    assert token_bytes == 3 * 16 * 2 + 4 + 3 * 2 * 4


def test_what_was_kept_is_not_computed_again(dense: None, monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v, buckets = make_inputs(2, 2, 37, 8, 3, 4, seed=0)
    order = sort_by_bucket(buckets)
    kept = KeptAttention()
    first = lsh_attention_flex(qk, v, order, window=5, key_norm="rms", kept=kept)
    expected = gradients(first, qk, v)
    with monkeypatch.context() as patch:
        patch.setattr(lsh_flex, "_attend_round", None)
        again = lsh_attention_flex(qk, v, None, window=5, key_norm="rms", kept=kept)
    assert torch.equal(again, first)
    for one, other in zip(gradients(again, qk, v), expected, strict=True):
        assert torch.equal(one, other)


def test_one_round_of_sorted_copies_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(inputs: tuple[Tensor, ...], lowest: Tensor, block_lists: BlockLists) -> tuple[Tensor, Tensor]:
        assert all(reference() is None for reference in seen)
        seen.extend(weakref.ref(x) for x in inputs)
        return dense_round(inputs, lowest, block_lists)

    monkeypatch.setattr(lsh_flex, "_attend_round", watched)
    qk, v, buckets = make_inputs(1, 2, 20, 4, 3, 4, seed=11)
    monkeypatch.setattr(lsh_flex, "_SLICE_ELEMENTS", 1)
    out = attend(qk, v, buckets, window=8)
    gradients(out, qk, v)
    # Two rows, three rounds, three tensors; forward and backward.
    assert len(seen) == 2 * 2 * 3 * 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [1, 77, 150])
def test_output_through_uncompiled_flex_equals_the_reference(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsh_flex, "_compiled", lambda: lsh_flex._sliding_window)
    qk, v, buckets = make_inputs(1, 2, tokens, 16, 3, 4, seed=12)
    with torch.no_grad():
        out = attend(qk, v, buckets, window=20, shifted=1)
        expected = lsh_attention_reference(qk, v, buckets, window=20, num_shifted_heads=1)
    torch.testing.assert_close(out, expected, **TIGHT)


def on_cuda(dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> Tensor:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 2, 30, dim))  # type: ignore[return-value]


@pytest.fixture
def able_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine on which nothing is in the way, whatever this one lacks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("CC", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    lsh_flex._compiler_obstacle.cache_clear()
    yield monkeypatch
    lsh_flex._compiler_obstacle.cache_clear()


def test_obstacles_of_tensors_are_named(able_machine: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 30, 64)
    assert flex_obstacle(x, x, 0.0) == "needs tensors on a CUDA device, and these are on cpu"
    fine = on_cuda()
    assert flex_obstacle(fine, fine, 0.0) is None
    assert flex_obstacle(fine, fine, 0.1) == "has no attention dropout"
    double = on_cuda(torch.float64)
    assert flex_obstacle(double, double, 0.0) == "takes float16, bfloat16 or float32, not float64"
    assert "one type" in (flex_obstacle(fine, on_cuda(torch.float32), 0.0) or "")
    for narrow in (on_cuda(dim=8), on_cuda(dim=15)):
        assert "head dimensions from 16 to 128" in (flex_obstacle(narrow, fine, 0.0) or "")
        assert "head dimensions from 16 to 128" in (flex_obstacle(fine, narrow, 0.0) or "")
    assert flex_obstacle(on_cuda(dim=16), on_cuda(dim=128), 0.0) is None
    wide = on_cuda(torch.float32, 65)
    assert flex_obstacle(wide, wide, 0.0) == "takes head dimensions from 16 to 64 in torch.float32, not 65"


def test_obstacles_of_the_machine_are_named(able_machine: pytest.MonkeyPatch) -> None:
    fine = on_cuda()

    def obstacle() -> str:
        lsh_flex._compiler_obstacle.cache_clear()
        return flex_obstacle(fine, fine, 0.0) or ""

    assert obstacle() == ""
    able_machine.setenv("TORCH_COMPILE_DISABLE", "1")
    assert "TORCH_COMPILE_DISABLE" in obstacle()
    able_machine.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in obstacle()
    able_machine.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in obstacle()
    able_machine.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert ("compute capability 8.0" in obstacle()) == (torch.version.hip is None)
