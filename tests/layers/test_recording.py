"""Recorded attention is the attention that was computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM, record_attention
from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.heads import AttentionReplay
from reformer_lm.layers.sequence import SequenceInfo

VARIANTS = [
    {},
    {"num_local_heads": 0},
    {"num_local_heads": [4, 0], "num_shifted_heads": [0, 2]},
    {"full_attention_threshold": 1000},
    {"full_attention_threshold": 10, "num_mem_kv": 3},
    {"lsh_mask": "chunked"},
    {"lsh_mask": "chunked", "num_mem_kv": 2, "num_local_heads": 1},
    {"position_type": "rotary", "allow_duplicate_attention": False, "attention_dropout": 0.5},
]


def make_model(**options: object) -> ReformerLMForCausalLM:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        bucket_size=8, **options,
    )  # fmt: skip
    return ReformerLMForCausalLM(config).double().eval()


@pytest.mark.parametrize("options", VARIANTS)
def test_weights_times_values_are_the_heads_outputs(options: dict[str, object]) -> None:
    model = make_model(**options)
    layer = model.reformer.stack.layers[1].attention
    assert isinstance(layer, LSHSelfAttention)
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    info = SequenceInfo(torch.arange(37).unsqueeze(0))
    with torch.no_grad(), record_attention(layer) as records:
        layer(x, info)
        heads = layer.project(x, info)
        replay = AttentionReplay()
        merged = layer.attend(heads, info, replay, 0.0)
    (record,) = records
    values = heads.value
    if heads.extra is not None:
        missing = torch.zeros(2, layer.local_heads, heads.extra[1].shape[2], values.shape[-1], dtype=torch.float64)
        values = torch.cat((values, torch.cat((missing, heads.extra[1]), dim=1)), dim=2)
    outputs = (record.weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(outputs, merged, rtol=0, atol=1e-11)
    assert (record.weights >= 0).all()
    if model.config.lsh_mask == "causal":
        assert torch.equal(record.weights[..., :37], record.weights[..., :37].tril())
    buckets = replay.buckets
    if buckets is None:
        assert record.buckets is None and record.order is None
    else:
        assert torch.equal(record.buckets, buckets.long())
        sorted_buckets = record.buckets.gather(-1, record.order)
        assert (sorted_buckets.diff(dim=-1) >= 0).all()


def test_recording_changes_nothing_and_replays_are_not_recorded() -> None:
    model = make_model(hidden_dropout_prob=0.2, attention_dropout=0.2).train()
    x = torch.randint(0, 50, (2, 40))
    results = []
    for recorded in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        with record_attention(model) if recorded else torch.enable_grad() as records:
            loss = model(x, labels=x).loss
            loss.backward()
        results.append([loss.detach(), torch.rand(1), *(p.grad for p in model.parameters())])
        if recorded:
            assert [record.layer_index for record in records] == [0, 1]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_long_inputs_get_no_weights_and_hooks_go_away() -> None:
    model = make_model()
    x = torch.randint(0, 50, (1, 20))
    with torch.no_grad():
        with record_attention(model, max_weights_tokens=19) as records:
            model(x)
        model(x)
    assert len(records) == 2
    assert all(record.weights is None and record.order is not None for record in records)


def test_documents_are_sorted_apart() -> None:
    model = make_model()
    documents = torch.tensor([[5] * 9 + [7] * 11])
    with torch.no_grad(), record_attention(model) as records:
        model(torch.randint(0, 50, (1, 20)), document_ids=documents)
    for record in records:
        assert torch.equal(record.weights[..., 9:, :9], torch.zeros_like(record.weights[..., 9:, :9]))
        assert (record.order[..., :9] < 9).all()


def test_a_model_without_our_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no attention layer"), record_attention(nn.Linear(2, 2)):
        pass
