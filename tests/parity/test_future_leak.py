"""What sets this package apart: in the peers, logits of causal LSH attention depend on later tokens."""

from __future__ import annotations

from typing import Any

import future_leak
import pytest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_local_heads": 0, "num_shifted_heads": 0},
        {"num_local_heads": 0, "position_type": "rotary", "full_attention_threshold": 16},
        {"num_local_heads": 4},
    ],
    ids=str,
)
def test_ours_do_not_move(options: dict[str, Any]) -> None:
    assert future_leak.ours(**options) < 1e-12


def test_ours_move_in_chunked_mode() -> None:
    assert future_leak.ours(lsh_mask="chunked", num_local_heads=0) > 1e-3


def test_those_of_reformer_pytorch_move() -> None:
    pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")
    assert future_leak.reformer_pytorch() > 1e-3


def test_those_of_transformers_move() -> None:
    assert future_leak.transformers() > 1e-3
