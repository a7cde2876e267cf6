"""The same results on a GPU as on the CPU; run by `make test-cuda` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.ops.hashing import hash_vectors, sample_rotations
from reformer_lm.ops.lsh import lsh_attention
from reformer_lm.training import main as train

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("shifted", [0, 2])
def test_attention_equals_the_cpu(tokens: int, shifted: int) -> None:
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        qk, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator) for _ in range(2))
        buckets = hash_vectors(qk.to(device), sample_rotations(3, 8, 4, (6,), seed=0))
        qk, v = (x.to(device).requires_grad_() for x in (qk, v))
        out = lsh_attention(qk, v, buckets, window=16, num_shifted_heads=shifted) + 0.0 * (qk.sum() + v.sum())
        results.append([x.cpu() for x in (buckets, out, *torch.autograd.grad(out.sin().sum(), (qk, v)))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_reversible_gradients_equal_plain_autograd(dropout: float) -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
        bucket_size=8, hidden_dropout_prob=dropout, attention_dropout=dropout, activation_dropout=dropout,
    )  # fmt: skip
    model = ReformerLMForCausalLM(config).double().cuda()
    x = torch.randint(0, 31, (2, 200), device="cuda")
    gradients = []
    for threshold in (0, 1000):
        model.reformer.stack.reversible_threshold = threshold
        model.zero_grad()
        torch.manual_seed(1)
        model(x, labels=x).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


def test_logits_equal_the_cpu_but_for_hash_ties() -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = ReformerLMForCausalLM(config).double().eval()
    x = torch.randint(0, 100, (1, 2000))
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(model.cuda()(x.cuda()).logits.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["--fp16", "--bf16", "--no_bf16"])
def test_the_trainer_trains(precision: str, tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data"
    config = tmp_path / "config.json"
    config.write_text(
        '{"model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"max_position_embeddings": 512}}'
    )
    arguments = [
        "--raw", "--raw_data_path", str(data / "train.json"), "--val_data_path", str(data / "val.json"),
        "--model_config", str(config), "--max_steps", "30", "--batch_size", "4", "--lr", "0.003", precision,
        "--tokenized_data_path", str(tmp_path / "tokens"), "--output_dir", str(tmp_path / "model"),
        "--writer_dir", str(tmp_path / "curves"), "--device", "cuda",
    ]  # fmt: skip
    assert train(arguments) == 0
    model = ReformerLMForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
