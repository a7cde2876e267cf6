"""What `lsh_flex` hands to FlexAttention: the rows laid end to end, the lists of blocks, and how often it compiles.

Without a GPU: FlexAttention runs uncompiled, or is followed through Dynamo without code generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from reformer_lm.ops import lsh_flex
from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.lsh_flex import lsh_attention_flex
from reformer_lm.ops.lsh_flex_blocks import BLOCK, Layout, window_block_lists


def dense_mask(lowest: Tensor) -> Tensor:
    """Which place sees which, bool [P, P], said differently from the code: its lowest and on, or nothing but itself."""
    place = torch.arange(lowest.shape[0])
    query, key = place.unsqueeze(1), place
    first = lowest.long().unsqueeze(1)
    return ((first <= key) & (key < query)) | ((first == query) & (key == query))


@pytest.fixture
def compilations() -> Iterator[Callable[[], int]]:
    """Has `_attend_round` compiled up to code generation, and counts how often."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lsh_flex._sliding_window, dynamic=True, fullgraph=True, backend=counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh_flex, "_compiled", lambda: compiled)
        yield lambda: counter.frame_count
    torch._dynamo.reset()


def random_layout(rows: int, tokens: int, window: int, buckets: int, seed: int) -> tuple[Layout, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = sort_by_bucket(torch.randint(0, buckets, (rows, tokens), generator=generator))
    layout = Layout(rows, tokens, window, torch.device("cpu"))
    return layout, layout.lowest(order.start)


def listed(counts: Tensor, blocks: Tensor) -> Tensor:
    """A list of blocks as a matrix, bool [N, N]."""
    number = blocks.shape[2]
    matrix = torch.zeros(number, number, dtype=torch.bool)
    for row, (count, entries) in enumerate(zip(counts.flatten().tolist(), blocks[0, 0].tolist(), strict=True)):
        # Also what stands behind a list's end is a block that exists.
        assert 1 <= count <= len(entries) and all(0 <= entry < number for entry in entries)
        assert entries[:count] == sorted(set(entries[:count]))
        matrix[row, entries[:count]] = True
    return matrix


def needed(lowest: Tensor) -> Tensor:
    """The blocks that hold an allowed pair, found by torch's own search."""
    first = lowest.long()

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = first[query]
        return ((start <= key) & (key < query)) | ((start == query) & (key == query))

    places = lowest.shape[0]
    assert torch.equal(create_mask(allowed, None, None, places, places, device="cpu")[0, 0], dense_mask(lowest))
    return create_block_mask(allowed, None, None, places, places, device="cpu", BLOCK_SIZE=BLOCK).to_dense()[0, 0] > 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 700),
    window=st.one_of(st.integers(1, 800), st.sampled_from([127, 128, 129, 255, 256, 257])),
    buckets=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 2**31),
)
def test_block_lists_lose_no_allowed_pair(rows: int, tokens: int, window: int, buckets: int, seed: int) -> None:
    layout, lowest = random_layout(rows, tokens, window, buckets, seed)
    lists = layout.block_lists
    keys, queries = listed(lists.key_counts, lists.keys), listed(lists.query_counts, lists.queries)
    assert torch.equal(keys, queries.T)
    search = needed(lowest)
    assert not (search & ~keys).any()
    if buckets == 1:
        # When a bucket fills a row they name no block too many.
        assert torch.equal(search, keys)
    for tensor in lists:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and not tensor._is_view()


def test_block_lists_stay_within_a_row() -> None:
    lists = window_block_lists(7, 3, 1000, torch.device("cpu"))
    row = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(listed(lists.key_counts, lists.keys), (row.unsqueeze(1) == row) & causal)


def test_few_widths_of_block_lists_for_any_length() -> None:
    # Each width is a compilation.
    for window, most in ((64, 1), (128, 1), (300, 3), (10**9, 11)):
        widths = {
            Layout(1, tokens, window, torch.device("cpu")).block_lists.keys.shape[3]
            for tokens in range(1, 1 << 17, 997)
        }
        assert len(widths) <= most


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 128), (2, 5), (3, 129), (1, 300)])
def test_layout_takes_tokens_to_their_places_and_back(rows: int, tokens: int) -> None:
    layout, lowest = random_layout(rows, tokens, 16, 3, seed=0)
    order = sort_by_bucket(torch.randint(0, 3, (rows, tokens), generator=torch.Generator().manual_seed(0)))
    index, places = layout.tokens_in(order.order), layout.places_of(order.inverse)
    assert index.shape == lowest.shape and index.shape[0] % BLOCK == 0 and index.shape[0] >= 2 * BLOCK
    assert torch.equal(index[places], torch.arange(rows * tokens))
    filling = torch.ones_like(index, dtype=torch.bool).index_fill(0, places, False)
    # Filling is a token of the same row, sees itself only, and nobody sees it.
    assert torch.equal(lowest[filling].long(), filling.nonzero().flatten())
    assert not dense_mask(lowest)[~filling][:, filling].any()
    row = torch.arange(index.shape[0]) // (-(-tokens // BLOCK) * BLOCK)
    within = row < rows
    assert torch.equal((index // tokens)[within], row[within])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "tokens", "window"), [(1, 1, 5), (2, 130, 64), (1, 400, 300)])
def test_uncompiled_flex_equals_the_dense_equivalent(
    rows: int, tokens: int, window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsh_flex, "_compiled", lambda: lsh_flex._sliding_window)
    layout, lowest = random_layout(rows, tokens, window, 3, seed=1)
    generator = torch.Generator().manual_seed(2)
    q, keys, values = (torch.randn(lowest.shape[0], dim, dtype=dtype, generator=generator) for dim in (16, 16, 32))
    actual = lsh_flex._attend_round((q, keys, values), lowest, layout.block_lists)
    logits = (q @ keys.T / math.sqrt(16)).masked_fill(~dense_mask(lowest), -math.inf)
    expected = (torch.softmax(logits, dim=-1) @ values, torch.logsumexp(logits, dim=-1))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype and one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def attend(batch: int, tokens: int, dim: int, window: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    qk, v = (torch.randn(batch, 2, tokens, dim, generator=generator) for _ in range(2))
    order = sort_by_bucket(torch.randint(0, 4, (batch, 2, 2, tokens), generator=generator))
    return lsh_attention_flex(qk, v, order, window=window, key_norm="rms")


def test_compiled_once_for_all_lengths_batches_and_starts(compilations: Callable[[], int]) -> None:
    for batch, tokens, window in ((1, 50, 64), (1, 1, 64), (3, 128, 10), (2, 129, 128), (1, 1000, 64), (2, 513, 3)):
        attend(batch, tokens, 16, window)
        # The state of autocast is part of what compiled code is guarded by.
        with torch.autocast("cpu", dtype=torch.float16):
            attend(batch, tokens, 16, window)
    assert compilations() == 1


def test_compiled_once_where_sizes_coincide(compilations: Callable[[], int]) -> None:
    # A compiler that sees two equal sizes may take them for one ever after: here two blocks and lists of two, then 256
    # places and head dimension 256.
    for number in (2, 3, 5):
        places = torch.arange(number * BLOCK)
        inputs = tuple(torch.randn(number * BLOCK, 2 * BLOCK) for _ in range(3))
        lists = window_block_lists(number, number, BLOCK, torch.device("cpu"))
        with torch.no_grad():
            lsh_flex._attend_round(inputs, places.int(), lists)
    assert compilations() == 1


def test_more_variants_than_torch_allows_by_default(compilations: Callable[[], int]) -> None:
    # Past its limit torch would run FlexAttention uncompiled, with all T x T logits.
    limit = torch._dynamo.config.recompile_limit
    for dim in range(1, limit + 3):
        attend(1, 10, dim, 4)
    assert compilations() == limit + 2
    assert torch._dynamo.config.recompile_limit == limit
