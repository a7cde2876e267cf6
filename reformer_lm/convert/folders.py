"""What formats files and folders have, and how converted models are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from reformer_lm.config import ReformerLMConfig
from reformer_lm.convert.hf_reformer import WEIGHT_FILES
from reformer_lm.convert.reformer_pytorch_reading import bare_names
from reformer_lm.convert.safe_loading import read_json, read_tensors
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.text import load_tokenizer

REFORMER_PYTORCH = "reformer-pytorch"
REFORMER_CHINESE = "reformer-chinese"
TRANSFORMERS = "transformers"
OURS = "reformer_lm"

# Of a folder that `--to reformer-pytorch` writes.
STATE_FILE, OPTIONS_FILE = "model.pt", "options.json"
# Of reformer-chinese, in the order of trust: the second one is a copy made at the end of training.
_CHINESE_WEIGHTS = ("model.pt", "model_cpu.pt")
# What its config.json says of the training windows, and ReformerLM does not know.
_CHINESE_ONLY = ("stride",)


def detect_format(source: Path) -> str:
    """Which package a file or folder is of.

    Raises:
        InputError: it does not exist, or cannot be told.
    """
    if source.is_file():
        return REFORMER_PYTORCH
    if not source.is_dir():
        raise InputError(f"{source}: there is no such file or folder")
    if (source / OPTIONS_FILE).is_file() and (source / STATE_FILE).is_file():
        return REFORMER_PYTORCH
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source}: there is neither config.json nor {OPTIONS_FILE} in this folder; for a state dict alone give "
            "the file itself, and its options with --config"
        )
    options = read_json(source / "config.json")
    kind = options.get("model_type")
    if kind == ReformerLMConfig.model_type:
        return OURS
    if kind == "reformer":
        return TRANSFORMERS
    if kind is None and "depth" in options:
        return REFORMER_CHINESE
    shown = "no model_type" if kind is None else f"model_type {kind!r}"
    raise InputError(f"{source / 'config.json'} has {shown}; say what it is with --from, if it is a Reformer")


def read_reformer_pytorch(source: Path, config: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and options of a file, or of a folder that `write_reformer_pytorch` wrote.

    Raises:
        InputError: there are no options, or something cannot be read.
    """
    weights = source / STATE_FILE if source.is_dir() else source
    if config is None and source.is_dir():
        config = source / OPTIONS_FILE
    if config is None:
        raise InputError(
            f"{source}: a state dict does not say how many heads, hashes and so on there are; give the arguments of "
            "ReformerLM as a JSON object with --config options.json"
        )
    return read_tensors(weights), read_json(config)


def read_reformer_chinese(
    folder: Path, config: Path | None, note: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and options of a folder of reformer-chinese: model.pt, config.json.

    Its training script writes the stride of its windows as ``dim`` into config.json; there the weights decide.

    Raises:
        InputError: something is missing or cannot be read.
    """
    options = read_json(config or folder / "config.json")
    weights = next((folder / name for name in _CHINESE_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{folder}: there are no weights ({' or '.join(_CHINESE_WEIGHTS)}); copy the folder again")
    state = read_tensors(weights)
    options = {name: value for name, value in options.items() if name not in _CHINESE_ONLY}
    norm = bare_names(state)[0].get("norm.weight")
    if norm is not None and options.get("dim") != norm.shape[0]:
        note(f"config.json says dim {options.get('dim')}, and the weights {norm.shape[0]}: the weights are right")
        options["dim"] = norm.shape[0]
    return state, options


def find_tokenizer(source: Path, vocabulary: Path | None, keep_case: bool) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a vocab.txt that was given, or lies in the source's folder; None if there is none.

    Raises:
        InputError: the vocabulary cannot be used.
    """
    if vocabulary is not None:
        return load_tokenizer(vocabulary, keep_case=keep_case)
    if source.is_dir() and (source / "vocab.txt").is_file():
        return load_tokenizer(source / "vocab.txt", keep_case=keep_case)
    return None


def require_free(output: Path, overwrite: bool) -> None:
    """Makes sure that a folder may be written.

    Raises:
        InputError: it is a file, or holds something and may not be overwritten.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"--output {output} is not empty; give another folder, or --overwrite")


def write_model(model: ReformerLMForCausalLM, tokenizer: PreTrainedTokenizerFast | None, output: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer, as training does.

    Raises:
        InputError: the vocabulary is larger than the model's, or the folder cannot be written.
    """
    if tokenizer is not None:
        rows = model.config.vocab_size
        if len(tokenizer) > rows:
            raise InputError(
                f"the vocabulary has {len(tokenizer):,} tokens, the model {rows:,}: they are of different models"
            )
        for name in ("bos", "eos", "pad"):
            setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        # Made from the configuration of a model that did not know them.
        model.generation_config = type(model.generation_config).from_model_config(model.config)
    _remove_model(output)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror or error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def write_reformer_pytorch(state: Mapping[str, Tensor], options: Mapping[str, Any], output: Path) -> None:
    """Writes a state dict of ReformerLM and its options, which `read_reformer_pytorch` reads.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), output / STATE_FILE)
        (output / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror or error}") from error


def _remove_model(output: Path) -> None:
    """Removes what an earlier model left, so that its pieces do not mix with the new one's."""
    for name in (*WEIGHT_FILES, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (output / name).unlink(missing_ok=True)
