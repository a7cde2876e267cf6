"""Models of reformer-pytorch to convert."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

# Small and odd: heads * dim_head differs from dim.
OPTIONS: dict[str, Any] = {
    "num_tokens": 19, "dim": 10, "depth": 3, "max_seq_len": 48, "heads": 3, "dim_head": 4, "bucket_size": 4,
    "n_hashes": 3, "ff_chunks": 5, "causal": True,
}  # fmt: skip


@pytest.fixture
def package() -> ModuleType:
    """reformer_pytorch."""
    return pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")


@pytest.fixture
def make_peer(package: ModuleType) -> Callable[..., Any]:
    """A ReformerLM in evaluation mode; called with options that change OPTIONS."""

    def make(**options: Any) -> Any:
        torch.manual_seed(0)
        peer = package.ReformerLM(**OPTIONS | options).eval()
        with torch.no_grad():
            # Nothing may stay 0 or 1: an unused or misplaced weight would not show.
            for parameter in peer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return peer

    return make
