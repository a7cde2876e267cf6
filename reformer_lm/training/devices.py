"""Where a run computes and how precisely."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from reformer_lm.errors import InputError
from reformer_lm.training.parallel import process_options


def choose_device(name: str | None) -> torch.device:
    """Turn the value of ``--device`` into a device that exists.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``; or, as in GPT2-Chinese, CUDA numbers such as ``0`` or ``0,1``, of
            which the first is used. None means CUDA if there is any, else the CPU.

    Raises:
        InputError: If the name means nothing or the device is not here.
    """
    if num_processes() > 1 and (name is None or name.strip() == "cuda") and torch.cuda.is_available():
        # Each process has a device of its own.
        name = os.environ.get("LOCAL_RANK", "0")
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    numbers = name.split(",")
    text = f"cuda:{int(numbers[0])}" if all(number.strip().isdecimal() for number in numbers) else name.strip()
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"--device is {name!r}; give cpu, cuda, cuda:0 or a CUDA number such as 0") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"only {count} CUDA device(s) are" if count else "no CUDA device is"
            raise InputError(f"--device is {name!r}, but {found} here; give another number or --device cpu")
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def create_accelerator(
    device: torch.device, *, fp16: bool = False, bf16: bool = False, fsdp: bool = False, layer_dropout: float = 0.0
) -> Accelerator:
    """Set accelerate up for this process, which may be one of several (torchrun, accelerate launch).

    Args:
        device: From `choose_device`; of several processes each takes the CUDA device of its local rank.
        fp16: Half precision with loss scaling.
        bf16: bfloat16 mixed precision.
        fsdp: Whether parameters are to be distributed over the processes.
        layer_dropout: The model's.

    Raises:
        InputError: If the device cannot compute in that precision, or FSDP2 is asked for what it cannot do.
    """
    if num_processes() > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            "WORLD_SIZE is set, but not MASTER_ADDR; start with torchrun or accelerate launch, which set both"
        )
    if fp16 and device.type == "cpu":
        raise InputError("--fp16 needs a CUDA device; on the CPU give --bf16 or neither")
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--bf16: {torch.cuda.get_device_name(device)} has no bfloat16; give --fp16")
    if fsdp and num_processes() == 1:
        raise InputError("--fsdp distributes a model over several processes; start with torchrun --nproc_per_node N")
    if fsdp and fp16:
        raise InputError("--fsdp and --fp16 do not go together; give --bf16")
    if fsdp and layer_dropout:
        raise InputError("--fsdp needs every layer in every step; set layer_dropout to 0 or leave --fsdp out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # accelerate keeps its state in the process; without this a second run in it (a notebook, a test) could
    # not choose another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "fp16" if fp16 else "bf16" if bf16 else "no"
    return Accelerator(
        mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=process_options(layer_dropout)
    )


def num_processes() -> int:
    """Processes that torchrun or accelerate launch started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def describe_device(device: torch.device) -> str:
    """The device for a person to read."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
