"""Attention from the next tokens over rings, against the oracle over whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops.hashing import hash_vectors, sample_rotations
from reformer_lm.ops.keys import normalize_keys
from reformer_lm.ops.lsh_reference import lsh_attention_reference
from reformer_lm.ops.lsh_rings import LSHRings
from reformer_lm.ops.shared_qk import shared_qk_attention

TIGHT = {"rtol": 0.0, "atol": 1e-11}


class Case:
    """Random vectors of whole sequences, their buckets, and what the oracle makes of them."""

    def __init__(
        self, batch: int = 1, heads: int = 2, tokens: int = 40, dim: int = 4, rounds: int = 2, buckets: int = 4,
        window: int = 5, shifted: int = 1, duplicates: bool = True, memory: int = 0, own_memory: bool = False,
        masked_memory: bool = False, key_norm: str = "rms", seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.qk, self.v = draw(batch, heads, tokens, dim), draw(batch, heads, tokens, dim + 1)
        self.buckets = hash_vectors(self.qk, sample_rotations(heads, dim, rounds, (buckets,), seed))
        rows = (batch,) if own_memory else ()
        self.memory = (draw(*rows, heads, memory, dim), draw(*rows, heads, memory, dim + 1)) if memory else None
        self.mask = torch.rand(batch, memory, generator=generator) < 0.5 if memory and masked_memory else None
        self.window, self.num_buckets, self.shifted = window, buckets, min(shifted, heads)
        self.duplicates, self.key_norm = duplicates, key_norm
        self.expected = self.of_rows(slice(None), tokens)

    def of_rows(self, rows: slice, tokens: int) -> Tensor:
        memory = None
        if self.memory is not None:
            own = rows if self.memory[0].dim() == 4 else slice(None)
            memory = (normalize_keys(self.memory[0][own], self.key_norm), self.memory[1][own])
        return lsh_attention_reference(
            self.qk[rows, :, :tokens], self.v[rows, :, :tokens], self.buckets[rows, ..., :tokens], window=self.window,
            key_norm=self.key_norm, num_shifted_heads=self.shifted, allow_duplicates=self.duplicates, memory=memory,
            memory_mask=None if self.mask is None else self.mask[rows],
        )  # fmt: skip

    def rings(self) -> LSHRings:
        return LSHRings(
            *self.buckets.shape[:3], self.num_buckets, window=self.window, key_norm=self.key_norm,
            num_shifted_heads=self.shifted, allow_duplicates=self.duplicates,
        )  # fmt: skip

    def attend(self, rings: LSHRings, begin: int, end: int) -> Tensor:
        piece = slice(begin, end)
        return rings.attend(
            self.qk[:, :, piece], self.v[:, :, piece], self.buckets[..., piece], memory=self.memory,
            memory_mask_BM=self.mask,
        )  # fmt: skip

    def fill(self, rings: LSHRings, end: int) -> None:
        rings.fill(self.qk[:, :, :end], self.v[:, :, :end], self.buckets[..., :end])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 150),
    dim=st.sampled_from([1, 4]),
    rounds=st.integers(1, 3),
    buckets=st.sampled_from([2, 4, 10]),
    window=st.sampled_from([1, 2, 5, 16, 200]),
    shifted=st.integers(0, 3),
    duplicates=st.booleans(),
    memory=st.integers(0, 2),
    own_memory=st.booleans(),
    masked_memory=st.booleans(),
    key_norm=st.sampled_from(["rms", "unit"]),
    cuts=st.lists(st.integers(0, 150), max_size=6),
    filled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pieces_of_any_length_equal_the_oracle(cuts: list[int], filled: bool, tokens: int, **options: object) -> None:
    case = Case(tokens=tokens, **options)
    rings = case.rings()
    borders = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    for begin, end in zip(borders, borders[1:], strict=False):
        if filled and begin == 0:
            case.fill(rings, end)
        else:
            torch.testing.assert_close(case.attend(rings, begin, end), case.expected[:, :, begin:end], **TIGHT)
    assert rings.lengths.tolist() == [tokens] * case.qk.shape[0]


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("cuts", [[1] * 60, [5, 20, 35], [60], [10, 50]])
def test_the_first_tokens_attend_to_all_before_them(cuts: list[int], memory: int) -> None:
    case = Case(batch=2, tokens=60, window=4, memory=memory)
    extra = None if case.memory is None else tuple(x.unsqueeze(0) for x in case.memory)
    early = shared_qk_attention(
        case.qk[:, :, :23], case.v[:, :, :23], key_norm="rms", num_shifted_heads=case.shifted, extra=extra
    )
    expected = torch.cat((early, case.expected[:, :, 23:]), dim=2)
    rings = case.rings()
    rings.full_attention_threshold = 23
    outputs, begin = [], 0
    for count in cuts:
        outputs.append(case.attend(rings, begin, begin + count))
        begin += count
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, **TIGHT)


def test_token_by_token_across_many_turns_of_the_rings() -> None:
    case = Case(tokens=300, window=4, buckets=2, batch=2)
    rings = case.rings()
    outputs = [case.attend(rings, t, t + 1) for t in range(300)]
    torch.testing.assert_close(torch.cat(outputs, dim=2), case.expected, **TIGHT)


def test_a_first_token_reads_itself_or_nothing() -> None:
    case = Case(heads=2, shifted=1)
    out = case.attend(case.rings(), 0, 1)
    assert torch.equal(out[:, 0], case.v[:, 0, :1])
    assert not out[:, 1].any()


@pytest.mark.parametrize("fill", [False, True])
def test_rows_of_different_lengths(fill: bool) -> None:
    case = Case(batch=3, tokens=90, window=6)
    counts = torch.tensor([40, 1, 23])
    rings = case.rings()
    first = (case.qk[:, :, :40], case.v[:, :, :40], case.buckets[..., :40])
    # What stands behind a row's tokens must not matter.
    behind = (torch.arange(40) >= counts.unsqueeze(1)).view(3, 1, 1, 40)
    first = tuple(x.masked_fill(behind if x.shape[-1] == 40 else behind.transpose(2, 3), 1) for x in first)
    if fill:
        rings.fill(*first, counts)
    else:
        out = rings.attend(*first, counts)
        for row, count in enumerate(counts.tolist()):
            torch.testing.assert_close(out[row, :, :count], case.expected[row, :, :count], **TIGHT)
    assert rings.lengths.tolist() == counts.tolist()
    for step in range(45):
        at = (counts + step).tolist()
        qk, v = (torch.stack([x[row, :, t : t + 1] for row, t in enumerate(at)]) for x in (case.qk, case.v))
        buckets = torch.stack([case.buckets[row, ..., t : t + 1] for row, t in enumerate(at)])
        out = rings.attend(qk, v, buckets)
        for row, t in enumerate(at):
            torch.testing.assert_close(out[row, :, 0], case.expected[row, :, t], **TIGHT)


@pytest.mark.parametrize("back", [1, 7, 64, 65, 100, 119])
@pytest.mark.parametrize("duplicates", [True, False])
def test_cropped_rings_equal_fresh_ones(back: int, duplicates: bool) -> None:
    case = Case(batch=2, tokens=150, window=4, buckets=2, duplicates=duplicates)
    cropped, fresh = case.rings(), case.rings()
    case.attend(cropped, 0, 120)
    # Other tokens stood there before.
    cropped.crop(torch.tensor([120 - back, 120 - back]))
    case.fill(fresh, 120 - back)
    assert torch.equal(cropped._rings[..., :-1], fresh._rings[..., :-1])
    assert torch.equal(cropped._counts, fresh._counts)
    for t in range(120 - back, 150):
        torch.testing.assert_close(case.attend(cropped, t, t + 1), case.expected[:, :, t : t + 1], **TIGHT)


def test_rows_cropped_to_different_lengths() -> None:
    case = Case(batch=3, tokens=60, window=4)
    rings = case.rings()
    case.attend(rings, 0, 50)
    lengths = torch.tensor([50, 33, 47])
    rings.crop(lengths)
    qk, v = (torch.stack([x[row, :, t : t + 1] for row, t in enumerate(lengths.tolist())]) for x in (case.qk, case.v))
    buckets = torch.stack([case.buckets[row, ..., t : t + 1] for row, t in enumerate(lengths.tolist())])
    out = rings.attend(qk, v, buckets)
    for row, t in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[row, :, 0], case.expected[row, :, t], **TIGHT)


def test_cropping_to_more_than_there_is_is_refused() -> None:
    case = Case()
    rings = case.rings()
    case.fill(rings, 10)
    with pytest.raises(ValueError, match=r"cannot crop to \[11\] tokens: there are \[10\]"):
        rings.crop(torch.tensor([11]))


def test_selected_rows_go_on_as_those_they_were() -> None:
    case = Case(batch=3, tokens=50)
    rings = case.rings()
    case.fill(rings, 40)
    index = torch.tensor([2, 0, 0, 2])
    rings.select(index)
    out = rings.attend(case.qk[index, :, 40:45], case.v[index, :, 40:45], case.buckets[index, ..., 40:45])
    torch.testing.assert_close(out, case.expected[index, :, 40:45], **TIGHT)


def test_room_grows_by_doubling() -> None:
    case = Case(tokens=400)
    rings = case.rings()
    capacities = []
    for t in range(400):
        case.attend(rings, t, t + 1)
        capacities.append(rings.capacity)
    assert sorted(set(capacities)) == [64, 128, 256, 512]
    assert rings.bytes() > 512 * 2 * (4 + 5) * 8


def test_no_uninitialised_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=2, tokens=100)
    rings = case.rings()
    case.fill(rings, 70)
    # What lies behind the last token, but for the place a shifted head may look at, which is written first.
    rings._keys[:, :, 70:] = float("nan")
    rings._values[:, :, 70:] = float("nan")
    torch.testing.assert_close(case.attend(rings, 70, 100), case.expected[:, :, 70:], **TIGHT)
