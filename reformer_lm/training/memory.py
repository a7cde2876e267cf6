"""How much memory a training step takes, told before training starts, and what to change when it is too much.

The estimate is measured, not derived: small models of the same width take short steps while the bytes of all live
tensors are counted, and what they take is carried on to the asked depth and length, in both of which it grows linearly
(beyond the lengths at which pieces and slices are full). So every option counts that the code knows, and nothing has to
be kept up to date beside it.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from reformer_lm.config import ReformerLMConfig
from reformer_lm.errors import InputError
from reformer_lm.training.optimization import state_bytes
from reformer_lm.training.tasks import TASKS, Task

# Steps of up to this many tokens are taken in full length.
SHORT = 16384
# What a process on the CPU holds besides live tensors: blocks that the C library keeps for later, libraries' buffers.
# A round figure for glibc, which keeps freed blocks of up to 32 MiB.
KEPT_BY_THE_ALLOCATOR = 160 << 20
_WARM_UP_TOKENS = 256
_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step takes at its peak.

    Attributes:
        parameters: The weights.
        gradients: One per weight.
        optimizer: What it keeps of each parameter, and the weights' moving average if there is one.
        activations: Everything else that is alive at the peak of forward and backward pass.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def lines(self) -> list[str]:
        """A small table."""
        rows = [
            (name, getattr(self, name)) for name in ("parameters", "gradients", "optimizer", "activations", "total")
        ]
        return [f"{name:<12} {size / _GIB:8.2f} GiB" for name, size in rows]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on, as long as they live.

    Attributes:
        now: Bytes alive.
        peak: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and looks at what came out."""
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                # A view, or what was written in place, is nothing new.
                if id(storage) not in given and storage not in self._known:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def estimate_memory(
    config: PretrainedConfig,
    batch_size: int,
    tokens: int,
    device: torch.device,
    precision: torch.dtype | None = None,
    optimizer: str = "adamw",
    averaged: bool = False,
    task: Task = TASKS["clm"],
) -> MemoryEstimate:
    """The memory of a training step.

    Takes some seconds, up to a minute for long sequences; of the asked model only shapes are made.

    Args:
        config: Of the model.
        batch_size: Windows in a batch.
        tokens: In a window.
        device: Where training is to run.
        precision: Of autocast; None for float32.
        optimizer: Its name.
        averaged: Whether a moving average of the weights is kept.
        task: What the model is trained for.
    """
    with torch.device("meta"):
        model = task.build(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = state_bytes(model, optimizer) + (weights if averaged else 0)
    # The last layer is not like the others, so one layer tells nothing of many: two and three do.
    depth = config.num_hidden_layers
    shallow = min(depth, 2)
    short = min(tokens, SHORT)
    activations = _activations(config, shallow, batch_size, short, device, precision, task)
    per_layer = 0
    if depth > shallow:
        per_layer = _activations(config, shallow + 1, batch_size, short, device, precision, task) - activations
    if tokens > short:
        longer = _activations(config, shallow, batch_size, 2 * short, device, precision, task)
        activations += (longer - activations) * (tokens - short) // short
        per_layer = per_layer * tokens // short
    activations += per_layer * (depth - shallow)
    return MemoryEstimate(weights, weights, kept, max(0, activations))


def _activations(
    config: PretrainedConfig,
    layers: int,
    batch_size: int,
    tokens: int,
    device: torch.device,
    precision: torch.dtype | None,
    task: Task = TASKS["clm"],
) -> int:
    """Peak of one step of a model with so many layers, less its weights and gradients.

    Gradients go as soon as they are there. To add all of them to the peak is exact with gradient accumulation, and else
    a little too much: early in the backward pass, where the peak may be, most of them do not exist yet.
    """
    random = torch.get_rng_state()
    model = task.build(_with_layers(config, layers)).to(device).train()
    torch.set_rng_state(random)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    batch = torch.randint(config.vocab_size, (batch_size, tokens), generator=torch.Generator().manual_seed(0)).to(
        device
    )

    def step(tokens: int | None = None) -> None:
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            loss = model(batch[:, :tokens], labels=batch[:, :tokens], use_cache=False).loss
        loss.backward()

    # What is made once (masks, compiled kernels, libraries' workspaces) is no part of a step.
    step(_WARM_UP_TOKENS)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as live:
        step()
    return live.peak + KEPT_BY_THE_ALLOCATOR


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of a shallower model."""
    settings = copy.deepcopy(config.to_dict())
    if not isinstance(config, ReformerLMConfig):
        # Some list what each layer is.
        settings.pop("layer_types", None)
        name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return type(config).from_dict({**settings, name: layers})
    for name in ("num_local_heads", "num_shifted_heads"):
        if isinstance(settings[name], list):
            # Not the first layers, which may all be local: the most LSH heads take the most.
            settings[name] = [settings[name][_busiest_layer(config)]] * layers
    return ReformerLMConfig(**{**settings, "num_hidden_layers": layers})


def _busiest_layer(config: ReformerLMConfig) -> int:
    return min(range(config.num_hidden_layers), key=config.local_heads_of)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device (for the CPU: in the machine), None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


@contextlib.contextmanager
def explained_out_of_memory(
    config: PretrainedConfig, batch_size: int, tokens: int, mixed_precision: bool
) -> Iterator[None]:
    """Turns an out-of-memory error into one that says what to change.

    Args:
        config: Of the model.
        batch_size: Windows in a batch.
        tokens: In a window.
        mixed_precision: Whether fp16 or bf16 is on.

    Raises:
        InputError: Memory, of the device or of the machine, was exhausted.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory with windows of {tokens:,} tokens, {batch_size} to a batch; what takes less: "
            f"{advice(config, batch_size, tokens, mixed_precision)} (--estimate says how much each would take)"
        ) from None


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def advice(config: PretrainedConfig, batch_size: int, tokens: int, mixed_precision: bool) -> str:
    """What would take less memory, the cheapest first."""
    ways = []
    if batch_size > 1:
        ways.append("a smaller --batch_size with a larger --gradient_accumulation")
    if isinstance(config, ReformerLMConfig):
        if config.reversible != "full" or tokens <= config.reversible_threshold:
            ways.append('"reversible": "full" and "reversible_threshold": 0 in the model configuration')
        if not config.ff_chunk_size or config.ff_chunk_size > tokens // 4:
            ways.append(f'"ff_chunk_size": {max(1, tokens // 8)}')
        if config.attn_chunks < config.num_attention_heads:
            ways.append(f'"attn_chunks": {config.num_attention_heads}')
    if not mixed_precision:
        ways.append("--bf16")
    ways.append("a smaller --max_seq_len")
    return ways[0] if len(ways) == 1 else ", ".join(ways[:-1]) + ", or " + ways[-1]
