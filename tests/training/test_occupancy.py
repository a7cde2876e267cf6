"""Bucket sizes are those that the attention recorder sees, and watching costs the run nothing but time."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM, record_attention
from reformer_lm.corpus import EvaluationWindows, TokenStream
from reformer_lm.training.evaluation import validate
from reformer_lm.training.occupancy import record_bucket_sizes


def make_model(**options: object) -> ReformerLMForCausalLM:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        bucket_size=8, **options,
    )  # fmt: skip
    return ReformerLMForCausalLM(config).eval()


def counted(buckets: torch.Tensor, num_buckets: int) -> dict[int, int]:
    """The slow way: token after token, round after round."""
    sizes: Counter[int] = Counter()
    for head in buckets:
        for one_round in head:
            held = Counter(one_round.tolist())
            sizes.update(held[bucket] for bucket in range(num_buckets))
    return dict(sizes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_buckets": 30, "num_hashes": 3, "attn_chunks": 4},
        {"num_local_heads": [4, 0, 2]},
        {"lsh_mask": "chunked"},
        {"full_attention_threshold": 10},
    ],
)
def test_sizes_are_those_of_the_recorder(options: dict[str, object]) -> None:
    model = make_model(**options)
    x = torch.randint(0, 50, (2, 40))
    with torch.inference_mode(), record_bucket_sizes(nn.Sequential(model)) as sizes:
        model(x)
    with torch.inference_mode(), record_attention(model, max_weights_tokens=0) as records:
        model(x)
    hashed = [record for record in records if record.buckets is not None]
    assert sorted(sizes) == [record.layer_index for record in hashed] != []
    for record in hashed:
        buckets = record.buckets[0]
        num_buckets = model.config.num_buckets or int(buckets.max()) + 1
        found = sizes[record.layer_index]
        assert found == counted(buckets, num_buckets)
        rounds = buckets.shape[0] * buckets.shape[1]
        assert sum(found.values()) == rounds * num_buckets
        assert sum(tokens * count for tokens, count in found.items()) == rounds * 40


def test_validation_watches_its_first_window_and_is_the_same() -> None:
    model = make_model()
    tokens = np.random.default_rng(0).integers(0, 50, 150).astype(np.uint16)
    windows = EvaluationWindows(TokenStream([tokens]), 40)
    random = torch.get_rng_state()
    result = validate(model, windows, 2, torch.device("cpu"))
    assert result is not None
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode(), record_bucket_sizes(model) as sizes:
        model(windows[0].unsqueeze(0))
    assert result.buckets == sizes
    assert len(sizes) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_other_models_and_layers_without_hashing_have_no_buckets() -> None:
    linear = nn.Linear(2, 2)
    with record_bucket_sizes(linear) as sizes:
        linear(torch.zeros(1, 2))
    assert sizes == {}
    model = make_model(num_local_heads=4)
    with torch.inference_mode(), record_bucket_sizes(model) as sizes:
        model(torch.zeros(1, 8, dtype=torch.long))
    assert sizes == {}
