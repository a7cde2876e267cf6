"""The reversible stack in two processes, through DistributedDataParallel and FSDP2: the same gradients as in one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

PROCESSES = 2
SETTINGS = [
    {},
    {"reversible": "keep_attention", "attn_chunks": 3},
    {"layer_dropout": 0.4, "ff_chunk_size": 5},
    {"share_layer_weights": True},
]


def make_model(**options: object) -> ReformerLMForCausalLM:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
        bucket_size=4, **options,
    )  # fmt: skip
    return ReformerLMForCausalLM(config).double().train()


def gradients(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Which layers are dropped must not depend on the process.
    torch.manual_seed(3)
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def compare(rank: int, folder: str) -> None:
    """In each process: one row of the batch through the wrapped model, against all rows through the bare one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        tokens = torch.randint(50, (PROCESSES, 32), generator=torch.Generator().manual_seed(1))
        for settings in SETTINGS:
            expected = gradients(make_model(**settings), tokens)
            sharded = make_model(**settings)
            # Shared weights are no one layer's.
            for layer in [] if "share_layer_weights" in settings else sharded.reformer.stack.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            wrapped = {"FSDP2": sharded}
            for unused in (False, True):
                # Without the search, a layer left out in a step would be waited for.
                if unused or "layer_dropout" not in settings:
                    wrapped[f"DDP, find_unused_parameters={unused}"] = nn.parallel.DistributedDataParallel(
                        make_model(**settings), find_unused_parameters=unused
                    )
            for name, model in wrapped.items():
                found = gradients(model, tokens[rank : rank + 1])
                for key, gradient in found.items():
                    # A layer that was left out has no gradient in one process, and may have zeros in several.
                    wanted = expected.get(key, torch.zeros_like(gradient))
                    torch.testing.assert_close(
                        gradient, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, n=name, k=key: f"{n}, {k}: {text}"
                    )
                assert expected.keys() <= found.keys(), name
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, args=(str(tmp_path),), nprocs=PROCESSES)
