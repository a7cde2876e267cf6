"""DDP and FSDP2 in two processes: forward, backward, update, and saving in one form to go on in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.devices import create_accelerator
from reformer_lm.training.optimization import build_optimizer
from reformer_lm.training.parallel import Processes, like, shard, shard_optimizer_state

PROCESSES = 2
KINDS = ("ddp", "fsdp2")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.filterwarnings("ignore"),
]


def make_model(seed: int = 0) -> ReformerLMForCausalLM:
    torch.manual_seed(seed)
    # Odd sizes: shards of two processes are uneven, and 31 tokens fill no whole block.
    config = ReformerLMConfig(
        vocab_size=51, hidden_size=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
        bucket_size=4, num_hashes=2, head_dim=6, intermediate_size=33,
    )  # fmt: skip
    return ReformerLMForCausalLM(config).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(51, (PROCESSES, 31), generator=generator) for _ in range(4)]


class Run:
    """One model in training; of a kind, or bare and alone for what the kinds are to equal."""

    def __init__(self, kind: str, accelerator: Accelerator, seed: int = 0) -> None:
        self.kind, self.processes = kind, Processes(accelerator)
        self.bare = self.model = make_model(seed)
        if kind == "fsdp2":
            shard(self.bare)
        # Momenta and decay both matter when training goes on.
        self.torch_optimizer = self.optimizer = build_optimizer(self.bare, 0.01, 0.1)
        if kind == "ddp":
            self.model, self.optimizer = accelerator.prepare(self.bare, self.torch_optimizer)
        elif kind == "fsdp2":
            self.optimizer = accelerator.prepare(self.torch_optimizer)

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens if self.kind == "bare" else tokens[self.processes.rank : self.processes.rank + 1]

    def step(self, tokens: Tensor) -> None:
        self.model.train()
        rows = self.rows(tokens)
        self.model(input_ids=rows, labels=rows).loss.backward()
        if self.kind == "bare":
            norm = float(torch.nn.utils.clip_grad_norm_(self.bare.parameters(), 0.5))
        else:
            norm = self.processes.clip_gradients(self.model, 0.5)
        # Else clipping would not be tested.
        assert norm > 0.5
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, tokens: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(input_ids=self.rows(tokens)).logits

    def weights(self) -> dict[str, Tensor]:
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
            for name, value in self.bare.state_dict().items()
        }

    def save(self, path: Path) -> None:
        """As checkpoints are saved: whole tensors, by the main process."""
        whole = self.processes.whole({"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()})
        if self.processes.is_main:
            torch.save(whole, path)
        self.processes.wait()


def loaded(kind: str, accelerator: Accelerator, path: Path) -> Run:
    """A run that goes on from a file; its model is another one before."""
    state = torch.load(path, weights_only=True)
    run = Run(kind, accelerator, seed=99)
    with torch.no_grad():
        for name, value in run.bare.state_dict().items():
            value.copy_(like(state["model"][name], value))
    run.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], run.optimizer))
    return run


def same_weights(run: Run, expected: Run, what: str) -> None:
    wanted = expected.weights()
    for name, value in run.weights().items():
        torch.testing.assert_close(value, wanted[name], **CLOSE, msg=lambda text, n=name: f"{what}, {n}: {text}")


def in_this_process(rank: int, folder: str, port: int, check: str) -> None:
    """One of the processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    accelerator = create_accelerator(torch.device("cpu"))
    try:
        CHECKS[check](accelerator, Path(folder))
    finally:
        dist.destroy_process_group()


def check_training(accelerator: Accelerator, folder: Path) -> None:
    first, second, third, test = batches()
    straight = Run("bare", accelerator)
    runs = {kind: Run(kind, accelerator) for kind in KINDS}
    for tokens in (first, second):
        straight.step(tokens)
    expected = straight.logits(test)
    for kind, run in runs.items():
        for tokens in (first, second):
            run.step(tokens)
        same_weights(run, straight, kind)
        torch.testing.assert_close(run.logits(test), run.rows(expected), **CLOSE)
        run.save(folder / kind)
        if kind == "fsdp2":
            # Each process holds a part only.
            local = sum(parameter.to_local().numel() for parameter in run.bare.parameters())
            assert local < 0.6 * sum(parameter.numel() for parameter in run.bare.parameters())
    straight.step(third)
    for source in KINDS:
        for kind in (*KINDS, "bare"):
            run = loaded(kind, accelerator, folder / source)
            run.step(third)
            same_weights(run, straight, f"{source}, then {kind}")


def check_distributed_checkpoints(accelerator: Accelerator, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    first, second = batches()[:2]
    straight = Run("bare", accelerator)
    straight.step(first)
    for kind in KINDS:
        run = Run(kind, accelerator)
        run.step(first)
        model, optimizer = get_state_dict(run.model, run.torch_optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / f"{kind} shards")
    straight.step(second)
    for source in KINDS:
        for kind in KINDS:
            run = Run(kind, accelerator, seed=99)
            model, optimizer = get_state_dict(run.model, run.torch_optimizer)
            state: dict[str, Any] = {"model": model, "optimizer": optimizer}
            dcp.load(state, checkpoint_id=folder / f"{source} shards")
            set_state_dict(
                run.model, run.torch_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            run.step(second)
            same_weights(run, straight, f"{source} shards, then {kind}")


CHECKS = {"training": check_training, "distributed checkpoints": check_distributed_checkpoints}


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("check", list(CHECKS))
def test_two_processes(check: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_this_process, args=(str(tmp_path), free_port(), check), nprocs=PROCESSES)
