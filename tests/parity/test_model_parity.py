"""A whole ReformerLM whose weights are copied over: logits and gradients, reversible against reversible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Their softmax over rounds is off by up to 7e-12 for tokens without a match (see test_attention_parity.py), and both
# backward passes rebuild their inputs.
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "axial": {"axial_position_emb": True},
    "axial with a shape": {"axial_position_emb": True, "axial_position_shape": (8, 7)},
    "absolute": {"absolute_position_emb": True},
    "fixed": {"fixed_position_emb": True},
    "emb_dim": {"emb_dim": 6, "axial_position_emb": True},
    "emb_dim, fixed": {"emb_dim": 14, "fixed_position_emb": True},
    "scale norm": {"use_scale_norm": True},
    "rezero": {"use_rezero": True, "absolute_position_emb": True},
    "ff_glu": {"ff_glu": True, "ff_mult": 3},
    "relu": {"ff_activation": nn.ReLU, "ff_chunks": 1},
    "local heads": {"n_local_attn_heads": 2, "axial_position_emb": True},
    "local heads, rotary elsewhere": {"n_local_attn_heads": 1},
    "full attention up to 16": {"full_attn_thres": 16},
    "full attention up to 16, axial": {"full_attn_thres": 16, "axial_position_emb": True},
    "full attention": {"use_full_attn": True, "fixed_position_emb": True},
    "full attention, rotary": {"use_full_attn": True},
    "full attention and local heads": {"use_full_attn": True, "n_local_attn_heads": 1},
    "plain autograd up to 24": {"reverse_thres": 24},
    "one round": {"n_hashes": 1, "depth": 1},
    "memory": {"num_mem_kv": 8},
    "memory and local heads": {"num_mem_kv": 8, "n_local_attn_heads": 2, "axial_position_emb": True},
    "memory, full attention": {"num_mem_kv": 3, "use_full_attn": True, "fixed_position_emb": True},
    "memory, full attention up to 24": {"num_mem_kv": 8, "full_attn_thres": 24},
    "own buckets only": {"lsh_attend_across_buckets": False},
    "duplicates once": {"lsh_allow_duplicate_attention": False},
    "duplicates once, own buckets only": {
        "lsh_allow_duplicate_attention": False, "lsh_attend_across_buckets": False, "num_mem_kv": 16,
        "axial_position_emb": True,
    },
    "layers share weights": {"weight_tie": True, "num_mem_kv": 8},
    "layers share weights, scale norm": {"weight_tie": True, "use_scale_norm": True, "n_local_attn_heads": 1},
    "layers share weights, rezero, plain autograd": {"weight_tie": True, "use_rezero": True, "reverse_thres": 48},
    "one value head": {"one_value_head": True, "n_local_attn_heads": 1},
    "one value head, memory": {"one_value_head": True, "num_mem_kv": 8, "axial_position_emb": True},
    "output tied to the embedding": {"weight_tie_embedding": True},
    "output tied to a factorised embedding": {"weight_tie_embedding": True, "emb_dim": 6, "axial_position_emb": True},
    "product-key memory": {"pkm_layers": (2,), "pkm_num_keys": 33},
    "product-key memory, rezero, plain autograd": {
        "pkm_layers": (1, 3), "pkm_num_keys": 40, "use_rezero": True, "reverse_thres": 48, "axial_position_emb": True,
    },
    "everything": {
        "emb_dim": 8, "axial_position_emb": True, "use_scale_norm": True, "ff_glu": True, "n_local_attn_heads": 1,
        "full_attn_thres": 8, "reverse_thres": 16, "n_hashes": 4, "bucket_size": 2,
    },
}  # fmt: skip


def random_tokens(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 19, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def give_rotations(ours: nn.Module, rotations: list[Tensor], set_rotations: Any) -> None:
    """Gives layer after layer what they drew in the forward pass; nothing where they hashed nothing."""
    layers = ours.reformer.stack.layers
    assert len(rotations) in (0, len(layers))
    for layer, rotation in zip(layers, rotations, strict=False):
        set_rotations(layer.attention, rotation)


@pytest.mark.parametrize("tokens", [8, 16, 24, 48])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients(
    make_pair: Any,
    recorder: Any,
    set_rotations: Any,
    assert_same_module: Any,
    double_by_default: None,
    options: dict[str, Any],
    tokens: int,
) -> None:
    theirs, ours = make_pair(**options)
    x = random_tokens(2, tokens)
    expected = theirs(x)
    rotations = recorder.take()
    # Their threshold counts the memory.
    full = options.get("use_full_attn") or tokens + options.get("num_mem_kv", 0) <= options.get("full_attn_thres", 0)
    assert len(rotations) == (0 if full else len(ours.reformer.stack.layers))
    give_rotations(ours, rotations, set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x).logits), TIGHT)


@pytest.mark.parametrize("options", [{}, {"axial_position_emb": True, "emb_dim": 6}], ids=["rotary", "axial"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 45])
def test_odd_lengths_under_full_attention(
    make_pair: Any, assert_same_module: Any, options: dict[str, Any], tokens: int
) -> None:
    theirs, ours = make_pair(use_full_attn=True, **options)
    x = random_tokens(3, tokens)
    assert_same_module((theirs, ours), (theirs(x), ours(x).logits), TIGHT)


@pytest.mark.parametrize("tokens", [1, 7, 25, 31])
def test_odd_lengths_filled_up_as_they_do(
    make_pair: Any, recorder: Any, set_rotations: Any, assert_same_module: Any, tokens: int
) -> None:
    from reformer_pytorch import Autopadder

    theirs, ours = make_pair(axial_position_emb=True)
    x = random_tokens(2, tokens)
    expected = Autopadder(theirs)(x)
    give_rotations(ours, recorder.take(), set_rotations)
    # Their padding is token 0 up to a multiple of 2 * bucket_size, and is hashed and sorted like any other token. We
    # cut off padding that no row needs, so a row without any keeps it here.
    length = -(-tokens // 8) * 8
    filled = torch.cat((nn.functional.pad(x, (0, length - tokens)), random_tokens(1, length)))
    mask = torch.arange(length) < torch.tensor([[tokens], [tokens], [length]])
    actual = ours(filled, attention_mask=mask).logits[:2, :tokens]
    assert_same_module((theirs, ours), (expected, actual), TIGHT)


def test_uneven_rows_under_full_attention(make_pair: Any, assert_same_module: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True, axial_position_emb=True)
    x = random_tokens(3, 20)
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    outputs = theirs(x, input_mask=mask), ours(x, attention_mask=mask).logits
    assert_same_module((theirs, ours), outputs, TIGHT, counts=mask)


@pytest.mark.parametrize(
    ("local_heads", "lengths"),
    # Their local heads give padding with nothing but padding in its window the mean of that window, look-around
    # values of -1 included; so each window here holds a real token.
    [(0, (24, 13, 3)), (1, (24, 13, 9)), (2, (24, 9, 24))],
)
def test_uneven_rows_with_lsh_attention(
    make_pair: Any,
    recorder: Any,
    set_rotations: Any,
    assert_same_module: Any,
    local_heads: int,
    lengths: tuple[int, ...],
) -> None:
    theirs, ours = make_pair(axial_position_emb=True, n_local_attn_heads=local_heads)
    x = random_tokens(3, 24)
    mask = torch.arange(24) < torch.tensor(lengths).unsqueeze(1)
    expected = theirs(x, input_mask=mask)
    give_rotations(ours, recorder.take(), set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x, attention_mask=mask).logits), TIGHT, counts=mask)


@pytest.mark.parametrize("options", [{}, {"use_full_attn": True, "n_local_attn_heads": 1}], ids=["lsh", "full"])
@pytest.mark.parametrize("reversible", [True, False])
def test_context_and_attention_mask(
    make_pair: Any,
    recorder: Any,
    set_rotations: Any,
    assert_same_module: Any,
    options: dict[str, Any],
    reversible: bool,
) -> None:
    theirs, ours = make_pair(num_mem_kv=4, reverse_thres=0 if reversible else 48, **options)
    x = random_tokens(2, 24)
    generator = torch.Generator().manual_seed(0)
    given = {
        "keys": torch.randn(2, 12, 10, dtype=torch.float64, generator=generator),
        "context_mask": torch.rand(2, 12, generator=generator) < 0.6,
        # A token may always see itself: theirs makes the mean of everything of a token that sees nothing.
        "input_attn_mask": (torch.rand(2, 24, 24, generator=generator) < 0.6) | torch.eye(24, dtype=torch.bool),
    }
    expected = theirs(x, **given)
    give_rotations(ours, recorder.take(), set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x, **given).logits), TIGHT)


def test_rotations_of_each_head(make_pair: Any, recorder: Any, set_rotations: Any, assert_same_module: Any) -> None:
    theirs, ours = make_pair(random_rotations_per_head=True)
    x = random_tokens(1, 48)
    expected = theirs(x)
    rotations = recorder.take()
    assert [rotation.shape[0] for rotation in rotations] == [3, 3, 3]
    give_rotations(ours, rotations, set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x).logits), TIGHT)


def test_evaluation_mode(make_pair: Any, recorder: Any, set_rotations: Any) -> None:
    theirs, ours = make_pair()
    x = random_tokens(2, 48)
    with torch.no_grad():
        expected = theirs.eval()(x)
        give_rotations(ours, recorder.take(), set_rotations)
        torch.testing.assert_close(ours.eval()(x).logits, expected, **TIGHT)
