"""Loading a trained model's folder, with one-line errors for everything that can be wrong with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from reformer_lm.config import ReformerLMConfig
from reformer_lm.encoder_decoder import ReformerEncDecConfig
from reformer_lm.errors import InputError
from reformer_lm.prediction.arguments import TRAINING_COMMAND
from reformer_lm.text import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def choose_device(name: str) -> torch.device:
    """Turn the value of ``--device`` into a device that exists.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1", or the number alone, as in GPT2-Chinese.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "auto":
        # Of torchrun's processes each takes a device of its own.
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?|(\d+)", name, flags=re.ASCII)
    if match is None:
        raise InputError(f"--device {name!r} is not supported; give auto, cpu, cuda or cuda:1")
    # Not left to torch, which takes cuda:257 for cuda:1.
    index = int(match[1] or match[2] or local_rank())
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices; give auto or cpu")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Turn the value of ``--dtype`` into the number format of the weights.

    Args:
        name: "auto", or a torch dtype's name.
        device: Where the model will run.

    Returns:
        The format, or None for "auto": as saved, but float32 in place of half precision on a CPU.

    Raises:
        InputError: If the device has no products in it.
    """
    if name == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 is for GPUs; on a CPU give float32, or bfloat16 where it is fast")
    found: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return found


def local_rank() -> int:
    """The number of this process among those of torchrun on this machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def load_model(
    directory: Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer from the folder that training wrote.

    Args:
        directory: The folder.
        device: Where the model goes.
        dtype: Number format of the weights; None for that they were saved in, or float32 on a CPU where that is half
            precision: it is exacter, and faster on most.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        InputError: If there is no model, or the folder is incomplete, damaged or inconsistent.
    """
    configuration = _check_configuration(directory)
    # Ours alone say so; what other bidirectional models there are is not for predict.py.
    fills_in = configuration["model_type"] == ReformerLMConfig.model_type and configuration.get("causal") is False
    kind = AutoModelForMaskedLM if fills_in else AutoModelForCausalLM
    if configuration["model_type"] == ReformerEncDecConfig.model_type:
        kind = AutoModelForSeq2SeqLM
    tokenizer = _load_tokenizer(directory)
    with _quiet_transformers():
        try:
            model, report = kind.from_pretrained(
                directory,
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
                # Reported below with the names of the tensors; left alone, it raises several lines.
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"{directory}: the model cannot be loaded ({_one_line(error)}); "
                "train it again or give another --model_dir"
            ) from None
    _check_weights(directory, report)
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {largest}, but config.json says vocab_size "
            f"{model.config.vocab_size}; the two are from different models"
        )
    if dtype is None and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if dtype is not None:
        model = model.to(dtype)
    return model.to(device).eval(), tokenizer


def _check_configuration(directory: Path) -> dict[str, object]:
    """Find out without transformers, whose messages speak of the hub, whether there is a model at all, and which."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: this is a file; --model_dir is the folder that training wrote")
    path = directory / "config.json"
    if not path.is_file():
        checkpoints = sorted((directory / "checkpoints").glob("step-*/config.json"))
        if checkpoints:
            raise InputError(
                f"{directory}: training has not finished here (no config.json); use its last checkpoint: "
                f"--model_dir {checkpoints[-1].parent}"
            )
        if any(directory.glob("*.safetensors")):
            raise InputError(f"{directory}: config.json is missing beside the weights; copy the folder again")
        raise InputError(f"no trained model in {directory}; train one with: {TRAINING_COMMAND}")
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: invalid JSON at line {error.lineno} column {error.colno}: {error.msg}; restore the file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 at byte {error.start}; restore the file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(configuration, dict) or not isinstance(configuration.get("model_type"), str):
        raise InputError(f'{path}: this is no model\'s configuration (no "model_type"); restore the file')
    return configuration


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory}: tokenizer.json is missing; copy the folder again")
    try:
        with _quiet_transformers():
            return load_tokenizer(directory)
    except InputError:
        raise
    # `tokenizers` raises bare Exception for a tokenizer.json it cannot parse.
    except Exception as error:
        raise InputError(
            f"{directory}: the tokenizer cannot be loaded ({_one_line(error)}); restore tokenizer.json"
        ) from None


def _check_weights(directory: Path, report: dict[str, object]) -> None:
    """Refuse weights that are not the configuration's; transformers would fill gaps with random ones."""
    for key, problem in (
        ("mismatched_keys", "has another shape than config.json says"),
        ("missing_keys", "is missing from the weights"),
        ("unexpected_keys", "is among the weights, but unknown to the model that config.json describes"),
    ):
        entries = report.get(key)
        if not entries:
            continue
        assert isinstance(entries, (list, set, tuple))
        names = sorted(entry[0] if isinstance(entry, tuple) else str(entry) for entry in entries)
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise InputError(f"{directory}: {names[0]}{others} {problem}; config.json and weights are of different models")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: what matters is turned into one-line errors here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    """The first sentence of a message that may be long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
