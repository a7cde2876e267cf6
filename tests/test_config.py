"""Configurations: what is resolved, what is refused, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from reformer_lm import ReformerLMConfig


def test_defaults_are_the_4096_token_model() -> None:
    config = ReformerLMConfig()
    assert config.max_position_embeddings == 4096
    assert config.num_buckets == 64
    assert config.axial_shape == [64, 64]
    assert (config.num_local_heads, config.num_shifted_heads) == (4, 4)
    assert config.local_window == 128
    assert config.intermediate_size == 2048


def test_number_of_buckets_is_even_and_factorised_when_large() -> None:
    assert ReformerLMConfig(max_position_embeddings=64 * 5).num_buckets == 6
    config = ReformerLMConfig(max_position_embeddings=1 << 20)
    assert config.bucket_factors == (128, 128)
    assert config.num_buckets == 16384
    assert ReformerLMConfig(lsh_mask="chunked").num_buckets is None


def test_saved_configuration_loads_equal(tmp_path: Path) -> None:
    config = ReformerLMConfig(vocab_size=77, num_buckets=1000, axial_dims=[200, 312], bos_token_id=4, eos_token_id=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ReformerLMConfig)
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 100, "num_attention_heads": 8}, ["hidden_size=100", "num_attention_heads"]),
        ({"num_buckets": 7}, ["num_buckets=7", "even"]),
        ({"bucket_size": 0}, ["bucket_size=0", "at least 1"]),
        ({"num_hashes": 2.5}, ["num_hashes=2.5", "whole number"]),
        ({"lsh_mask": "future"}, ["lsh_mask='future'", '"causal"', '"chunked"']),
        ({"causal": False}, ["causal=False", 'lsh_mask="chunked"']),
        (
            {"causal": False, "lsh_mask": "chunked", "num_shifted_heads": 1},
            ["num_shifted_heads=1", "causal=False"],
        ),
        ({"key_norm": "l2"}, ["key_norm='l2'", '"rms"']),
        ({"rehash": "often"}, ["rehash='often'", '"step"']),
        ({"num_local_heads": 9}, ["num_local_heads=9", "num_attention_heads (8)"]),
        ({"num_shifted_heads": 5}, ["num_shifted_heads=5", "0 to 4"]),
        ({"position_type": "alibi"}, ["position_type='alibi'", '"rotary"']),
        ({"axial_shape": [8, 8]}, ["axial_shape=[8, 8]", "64", "4096"]),
        ({"axial_shape": [4096]}, ["axial_shape=[4096]", "two"]),
        ({"axial_dims": [100, 100]}, ["axial_dims=[100, 100]", "512"]),
        ({"axial_shape": [64, 64], "position_type": "rotary"}, ["axial_shape", "position_type"]),
        ({"head_dim": 3}, ["head_dim=3", "even"]),
        ({"norm_type": "batchnorm"}, ["norm_type='batchnorm'"]),
        ({"ff_activation": "tanh"}, ["ff_activation='tanh'", '"gelu"']),
        ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "below 1"]),
        ({"layer_dropout": "much"}, ["layer_dropout='much'", "probability"]),
        ({"embedding_size": 7, "position_type": "sinusoidal"}, ["embedding_size=7", "even"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_combinations_name_field_value_and_remedy(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match="is not possible: ") as caught:
        ReformerLMConfig(**options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
