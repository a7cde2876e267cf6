"""Several processes that train one model: DistributedDataParallel or FSDP2, and whole tensors for checkpoints.

One process is the case of one: everything here then does nothing, so that the loop has one form.

accelerate sets the processes up (torchrun, `accelerate launch`), chooses devices and wraps for DistributedDataParallel.
Sharding goes straight to torch's `fully_shard`: accelerate 1.15 offers FSDP2 on accelerators only, and the same lines
have to run on the CPU, where they are tested.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

# The main process tokenises while the others wait.
PATIENCE = datetime.timedelta(hours=12)


def process_options(layer_dropout: float) -> list[KwargsHandler]:
    """What accelerate is to tell torch.distributed.

    Args:
        layer_dropout: The model's. A layer that a step leaves out has no gradient, and would be waited for.
    """
    return [
        DistributedDataParallelKwargs(find_unused_parameters=layer_dropout > 0),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]


def shard(model: PreTrainedModel) -> None:
    """Distribute a model's parameters over all processes, layer by layer, in place (FSDP2).

    Args:
        model: On its device, the same in every process.
    """
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    # Shared weights cannot belong to one layer: they are gathered with what stands around the layers.
    for layer in [] if getattr(model.config, "share_layer_weights", False) else layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """A model's layers, by what its class says must not be split."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


class Processes:
    """The processes of a run, as seen from one of them.

    Args:
        accelerator: Set up for this process.

    Attributes:
        count: How many there are.
        rank: Number of this one, from 0.
        is_main: Whether this is the one that writes and prints.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process

    def sum(self, values: Iterable[float]) -> list[float]:
        """Add numbers up over all processes, in double precision where the device has it."""
        if self.count == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum([float(flag)])[0] > 0

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes by rank (every process gets them)."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def gradients(self, model: nn.Module, *, complete: bool) -> Iterator[None]:
        """Around forward and backward pass of one batch of a step.

        Args:
            model: As prepared.
            complete: Whether this is the step's last batch, after which gradients are exchanged; before it they are
                only added up here.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(complete)
            yield
        elif complete:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Clip the norm of all gradients together.

        Returns:
            The norm before.
        """
        if isinstance(model, FSDPModule):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            # Unscales the gradients of fp16, too.
            norm = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def whole(self, value: Any) -> Any:
        """Replace shards by whole tensors, in the CPU's memory, at any depth of dictionaries and lists.

        Every process must call this, since all give their shards; the main one alone gets the tensors (others: None
        in their place). What is no shard stays as it is.
        """
        if isinstance(value, DTensor):
            tensor = value.full_tensor()
            return tensor.cpu() if self.is_main else None
        if isinstance(value, dict):
            return {key: self.whole(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.whole(entry) for entry in value)
        return value


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the shard that belongs to a parameter's, or as it is where there are none."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Cut the whole tensors of a saved optimizer as its parameters are cut.

    Args:
        state: From `torch.optim.Optimizer.state_dict`, whole.
        optimizer: That is to load it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {}
    for number, entry in state["state"].items():
        parameter = parameters[number] if number < len(parameters) else None
        entries[number] = {
            name: like(value, parameter)
            if isinstance(value, Tensor) and parameter is not None and value.shape == parameter.shape
            else value
            for name, value in entry.items()
        }
    return {**state, "state": entries}
