"""The memory estimate: what it counts, how it carries on to depth and length, what is said when it is too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.errors import InputError
from reformer_lm.training import main, memory
from reformer_lm.training.memory import LiveTensors, advice, estimate_memory, explained_out_of_memory

CPU = torch.device("cpu")
MIB = 2**20


def make_config(**options: object) -> ReformerLMConfig:
    settings = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 1024, "bucket_size": 16, "num_hashes": 2, "ff_chunk_size": 64,
    }  # fmt: skip
    return ReformerLMConfig(**{**settings, **options})


def test_live_tensors_are_counted_once_and_as_long_as_they_live() -> None:
    with LiveTensors() as live:
        x = torch.ones(MIB // 4)
        assert (live.now, live.peak) == (MIB, MIB)
        x.add_(1)
        view = x.view(-1, 2)[:, 0]
        assert live.now == MIB
        y = x * 2
        assert live.now == 2 * MIB
        del x
        # The view holds it.
        assert live.now == 2 * MIB
        del view
        assert live.now == MIB
        (y.exp() + y).sum().item()
        # Both, and the sum of both.
        assert live.peak == 3 * MIB
        assert live.now == MIB


def test_what_a_graph_keeps_is_alive() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)
    with LiveTensors() as live:
        y = x.exp()
        z = y.sin()
        del y
        assert live.now == 2 * MIB
        del z
        assert live.now == 0


@pytest.mark.parametrize("reversible", ["full", "keep_attention", "off"])
def test_depth_is_extrapolated(reversible: str) -> None:
    config = make_config(reversible=reversible)
    estimate = estimate_memory(config, 2, 256, CPU)
    directly = memory._activations(config, 5, 2, 256, CPU, None)
    slack = memory.KEPT_BY_THE_ALLOCATOR
    assert estimate.activations - slack == pytest.approx(directly - slack, rel=0.05)
    model = ReformerLMForCausalLM(config)
    assert estimate.parameters == estimate.gradients == 4 * sum(p.numel() for p in model.parameters())
    assert estimate.optimizer == 2 * estimate.parameters
    assert estimate.total == 4 * estimate.parameters + estimate.activations


def test_length_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    directly = memory._activations(config, 5, 1, 1024, CPU, None)
    monkeypatch.setattr(memory, "SHORT", 256)  # more than a CPU attends to in one piece
    lengths = []
    original = memory._activations

    def watched(config: ReformerLMConfig, layers: int, batch: int, tokens: int, *rest: object) -> int:
        lengths.append((layers, tokens))
        return original(config, layers, batch, tokens, *rest)

    monkeypatch.setattr(memory, "_activations", watched)
    estimate = estimate_memory(config, 1, 1024, CPU)
    assert lengths == [(2, 256), (3, 256), (2, 512)]
    slack = memory.KEPT_BY_THE_ALLOCATOR
    assert estimate.activations - slack == pytest.approx(directly - slack, rel=0.1)


def test_modes_stand_in_the_order_of_what_they_keep() -> None:
    activations = [
        estimate_memory(make_config(reversible=mode), 1, 512, CPU).activations
        for mode in ("full", "keep_attention", "off")
    ]
    assert activations == sorted(activations) and len(set(activations)) == 3


def test_heads_given_per_layer_count_as_the_layer_with_the_most_lsh_heads() -> None:
    config = make_config(num_local_heads=[4, 4, 0, 4, 4], num_shifted_heads=[0, 0, 4, 0, 0])
    shallow = memory._with_layers(config, 2)
    assert shallow.num_local_heads == [0, 0] and shallow.num_shifted_heads == [4, 4]
    assert estimate_memory(config, 1, 64, CPU).parameters > 0


def test_an_estimate_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    estimate_memory(make_config(), 1, 32, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_out_of_memory_is_explained(error: Exception) -> None:
    expected = r"64 tokens, 4 to a batch.*--batch_size.*\"attn_chunks\": 4.*--bf16.*--max_seq_len.*--estimate"
    with pytest.raises(InputError, match=expected), explained_out_of_memory(make_config(), 4, 64, False):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explained_out_of_memory(make_config(), 4, 64, False):
        raise RuntimeError("shapes differ")


def test_advice_names_only_what_would_help() -> None:
    all_of_it = make_config(ff_chunk_size=4, attn_chunks=4)
    assert advice(all_of_it, 1, 64, True) == "a smaller --max_seq_len"
    assert '"reversible": "full"' in advice(make_config(reversible="off"), 1, 64, True)
    assert '"reversible": "full"' in advice(make_config(reversible_threshold=64), 1, 64, True)
    assert '"ff_chunk_size": 8' in advice(make_config(ff_chunk_size=0), 1, 64, True)


def test_the_flag_prints_a_table_and_trains_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--estimate", "--batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "windows of 16 tokens, 2 to a batch, on cpu" in printed
    for name in ("parameters", "gradients", "optimizer", "activations", "total", "free"):
        assert f"{name} " in printed
    assert "more than is free" not in printed
    assert not (workplace / "model").exists() and not (workplace / "data" / "tokenized").exists()


def test_the_flag_says_when_it_is_too_much(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reformer_lm.training.command.free_memory", lambda device: 1000)
    assert main(["--estimate", "--batch_size", "2"]) == 0
    assert "more than is free; what takes less: a smaller --batch_size" in capsys.readouterr().out


def test_training_out_of_memory_ends_with_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: ReformerLMForCausalLM, *args: Tensor, **kwargs: Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(ReformerLMForCausalLM, "forward", exhausted)
    assert main(["--raw", "--batch_size", "2", "--max_seq_len", "16"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "out of memory with windows of 16 tokens, 2 to a batch; what takes less: a smaller --batch_size" in line
