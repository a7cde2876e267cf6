"""Local attention from the next tokens over a ring, against local attention over whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops.local import local_attention
from reformer_lm.ops.local_ring import LocalRing

TIGHT = {"rtol": 0.0, "atol": 1e-11}


def draw(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3))


def whole(inputs: tuple[Tensor, ...], window: int, self_bias: float = 0.0) -> Tensor:
    return local_attention(*inputs, window=window, exact_window=True, self_bias=self_bias)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 250),
    window=st.sampled_from([1, 2, 7, 64, 100]),
    self_bias=st.sampled_from([0.0, -5e4]),
    cuts=st.lists(st.integers(0, 250), max_size=6),
    filled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pieces_of_any_length_equal_the_whole(
    batch: int, tokens: int, window: int, self_bias: float, cuts: list[int], filled: bool, seed: int
) -> None:
    inputs = draw(batch, 2, tokens, 4, seed=seed)
    expected = whole(inputs, window, self_bias)
    ring = LocalRing(batch, window=window, self_bias=self_bias)
    borders = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    for begin, end in zip(borders, borders[1:], strict=False):
        q, k, v = (x[:, :, begin:end] for x in inputs)
        if filled and begin == 0:
            ring.fill(k, v)
        else:
            torch.testing.assert_close(ring.attend(q, k, v), expected[:, :, begin:end], **TIGHT)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("counts", [[40, 1, 23], [200, 150, 199]])
def test_rows_of_different_lengths(counts: list[int], filled: bool) -> None:
    inputs = draw(3, 2, 260, 4)
    expected = whole(inputs, 9)
    ring = LocalRing(3, window=9)
    first = tuple(x[:, :, : max(counts)] for x in inputs)
    if filled:
        ring.fill(*first[1:], torch.tensor(counts))
    else:
        out = ring.attend(*first, torch.tensor(counts))
        for row, count in enumerate(counts):
            torch.testing.assert_close(out[row, :, :count], expected[row, :, :count], **TIGHT)
    for step in range(50):
        at = [count + step for count in counts]
        out = ring.attend(*(torch.stack([x[row, :, t : t + 1] for row, t in enumerate(at)]) for x in inputs))
        for row, t in enumerate(at):
            torch.testing.assert_close(out[row, :, 0], expected[row, :, t], **TIGHT)


def test_cropped_rings_go_on_as_if_nothing_had_been() -> None:
    inputs = draw(2, 2, 400, 4)
    expected = whole(inputs, 9)
    ring = LocalRing(2, window=9)
    ring.fill(*(x[:, :, :300] for x in inputs[1:]))
    others = draw(2, 2, 30, 4, seed=1)
    for back in (30, 7, 23):
        ring.attend(*(x[:, :, :back] for x in others))
        ring.crop(torch.tensor([300, 300]))
    ring.crop(torch.tensor([290, 299]))
    for step in range(100):
        at = [290 + step, 299 + step]
        out = ring.attend(*(torch.stack([x[row, :, t : t + 1] for row, t in enumerate(at)]) for x in inputs))
        for row, t in enumerate(at):
            torch.testing.assert_close(out[row, :, 0], expected[row, :, t], **TIGHT)


def test_what_was_overwritten_cannot_be_gone_back_to() -> None:
    inputs = draw(1, 2, 300, 4)
    ring = LocalRing(1, window=9)
    ring.fill(*(x[:, :, :200] for x in inputs[1:]))
    most = ring.size - 9 + 1
    with pytest.raises(ValueError, match=rf"at most \[{most}\] can be taken back"):
        ring.crop(torch.tensor([200 - most - 1]))
    with pytest.raises(ValueError, match=r"there are \[200\]"):
        ring.crop(torch.tensor([201]))
    ring.crop(torch.tensor([200 - most]))
    out = ring.attend(*(x[:, :, 200 - most : 201 - most] for x in inputs))
    torch.testing.assert_close(out, whole(inputs, 9)[:, :, 200 - most : 201 - most], **TIGHT)
    # A second step back counts from what was overwritten at first.
    with pytest.raises(ValueError, match="can be taken back"):
        ring.crop(torch.tensor([199 - most]))


def test_a_short_row_can_be_gone_back_to_its_beginning() -> None:
    inputs = draw(1, 2, 30, 4)
    ring = LocalRing(1, window=9)
    ring.attend(*inputs)
    ring.crop(torch.tensor([0]))
    torch.testing.assert_close(ring.attend(*inputs), whole(inputs, 9), **TIGHT)


def test_selected_rows_go_on_as_those_they_were() -> None:
    inputs = draw(3, 2, 50, 4)
    ring = LocalRing(3, window=9)
    ring.fill(*(x[:, :, :40] for x in inputs[1:]))
    index = torch.tensor([2, 0, 0, 2])
    ring.select(index)
    torch.testing.assert_close(
        ring.attend(*(x[index, :, 40:45] for x in inputs)), whole(inputs, 9)[index, :, 40:45], **TIGHT
    )
