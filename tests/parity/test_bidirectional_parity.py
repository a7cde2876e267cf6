"""ReformerLM(causal=False) against our bidirectional model: logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

TIGHT = {"rtol": 1e-9, "atol": 1e-9}

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "axial, factorised": {"axial_position_emb": True, "emb_dim": 6},
    "local heads": {"n_local_attn_heads": 2, "axial_position_emb": True},
    "full attention up to 16": {"full_attn_thres": 16, "fixed_position_emb": True},
    "full attention": {"use_full_attn": True, "n_local_attn_heads": 1},
    "memory": {"num_mem_kv": 8, "n_local_attn_heads": 1},
    "memory, full attention": {"num_mem_kv": 3, "use_full_attn": True},
    "own buckets only": {"lsh_attend_across_buckets": False},
    "duplicates once": {"lsh_allow_duplicate_attention": False, "reverse_thres": 48},
    "everything": {
        "emb_dim": 8, "axial_position_emb": True, "use_scale_norm": True, "ff_glu": True, "n_local_attn_heads": 1,
        "full_attn_thres": 8, "reverse_thres": 16, "n_hashes": 4, "bucket_size": 2,
    },
}  # fmt: skip


def random_tokens(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 19, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def give_rotations(ours: nn.Module, rotations: list[Tensor], set_rotations: Any) -> None:
    layers = ours.reformer.stack.layers
    assert len(rotations) in (0, len(layers))
    for layer, rotation in zip(layers, rotations, strict=False):
        set_rotations(layer.attention, rotation)


@pytest.mark.parametrize("tokens", [8, 16, 48])
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
    theirs, ours = make_pair(causal=False, **options)
    x = random_tokens(2, tokens)
    expected = theirs(x)
    give_rotations(ours, recorder.take(), set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x).logits), TIGHT)


def test_both_sides_are_seen(make_pair: Any) -> None:
    _, ours = make_pair(causal=False, n_local_attn_heads=1)
    x = random_tokens(1, 24)
    changed = x.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 19
    before, after = ours.eval()(x).logits, ours(changed).logits
    assert not torch.allclose(before[0, :15], after[0, :15])


@pytest.mark.parametrize("local_heads", [0, 1])
def test_uneven_rows(
    make_pair: Any, recorder: Any, set_rotations: Any, assert_same_module: Any, local_heads: int
) -> None:
    theirs, ours = make_pair(causal=False, axial_position_emb=True, n_local_attn_heads=local_heads)
    x = random_tokens(3, 24)
    # Their local heads give padding with nothing real in its windows values that later layers would hash.
    mask = torch.arange(24) < torch.tensor([[24], [13], [9]])
    expected = theirs(x, input_mask=mask)
    give_rotations(ours, recorder.take(), set_rotations)
    assert_same_module((theirs, ours), (expected, ours(x, attention_mask=mask).logits), TIGHT, counts=mask)


@pytest.mark.parametrize("options", [{}, {"use_full_attn": True, "n_local_attn_heads": 1}], ids=["lsh", "full"])
def test_context_and_attention_mask(
    make_pair: Any, recorder: Any, set_rotations: Any, assert_same_module: Any, options: dict[str, Any]
) -> None:
    theirs, ours = make_pair(causal=False, num_mem_kv=4, **options)
    x = random_tokens(2, 24)
    generator = torch.Generator().manual_seed(0)
    given = {
        "keys": torch.randn(2, 12, 10, dtype=torch.float64, generator=generator),
        "context_mask": torch.rand(2, 12, generator=generator) < 0.6,
        "input_attn_mask": (torch.rand(2, 24, 24, generator=generator) < 0.6) | torch.eye(24, dtype=torch.bool),
    }
    expected = theirs(x, **given)
    give_rotations(ours, recorder.take(), set_rotations)
    hidden = ours.reformer(x, **given).last_hidden_state
    assert_same_module((theirs, ours), (expected, ours.compute_logits(hidden)), TIGHT)


def test_a_row_alone_where_padding_is_not_sorted(
    make_pair: Any, recorder: Any, set_rotations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = make_pair(causal=False, n_local_attn_heads=1, axial_position_emb=True)
    ours.config.sort_padding = False
    x = random_tokens(2, 24)
    mask = torch.arange(24) < torch.tensor([[24], [16]])
    with torch.no_grad():
        for row, length in ((0, 24), (1, 16)):
            alone = theirs(x[row : row + 1, :length])
            rotations = recorder.take()
            # Rotations are those of one length: the other row is there, but nobody looks at it.
            for layer, rotation in zip(ours.reformer.stack.layers, rotations, strict=True):
                monkeypatch.setattr(
                    layer.attention,
                    "rotations",
                    lambda num_buckets, *_, drawn=rotation: (
                        (drawn,) if num_buckets == 2 * drawn.shape[-1] else (torch.ones(1, 4, 3, num_buckets // 2),)
                    ),
                )
            padded = ours(x, attention_mask=mask).logits[row : row + 1, :length]
            torch.testing.assert_close(padded, alone, **TIGHT)
