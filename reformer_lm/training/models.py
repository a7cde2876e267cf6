"""The model of a run: new from a configuration, or taken from a folder of weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from reformer_lm.config import ReformerLMConfig
from reformer_lm.errors import InputError
from reformer_lm.layers import FeedForward
from reformer_lm.training.config_files import ConfigFile
from reformer_lm.training.model_configs import build_config, build_encoder_decoder_config, model_keys, one_line
from reformer_lm.training.tasks import TASKS, Task

WEIGHTS_NAME = "model.safetensors"

# Sampling that suits a small model, for any tool that reads the saved folder; predict.py has its own flags.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 40, "top_p": 0.95}


@dataclass(frozen=True)
class ModelSource:
    """Where a run's model comes from.

    Attributes:
        config: Of the model.
        folder: Of the weights; None for a new model.
        task: What it is trained for.
    """

    config: PretrainedConfig
    folder: Path | None
    task: Task = TASKS["clm"]


def choose_model(
    config_file: ConfigFile | None,
    config_is_given: bool,
    folder: Path | None,
    tokenizer: PreTrainedTokenizerFast,
    task: Task = TASKS["clm"],
) -> ModelSource:
    """Decide on a run's model and make sure, before anything costs time, that its parts fit together.

    Args:
        config_file: The configuration file, None for the built-in defaults.
        config_is_given: Whether the user named that file; otherwise a folder's own configuration counts.
        folder: Weights to start from, None for new ones.
        tokenizer: Of the run.
        task: What the model is trained for.

    Raises:
        InputError: If there is no model in the folder, its tensors have other shapes than the configuration or the
            tokenizer ask for, or the model is not one for the task.
    """
    build = build_encoder_decoder_config if task.name == "seq2seq" else build_config
    settings, origin = (config_file.model, config_file.path) if config_file else ({}, "the built-in configuration")
    if settings.get("model_type", ReformerLMConfig.model_type) == ReformerLMConfig.model_type:
        settings = {**task.settings, **settings} if task.settings else settings
    if folder is None:
        config = build(settings, origin, tokenizer)
        task.require_kind(config, origin)
        return ModelSource(config, None, task)
    saved_settings = _read_saved_settings(folder)
    saved_size = saved_settings.get("decoder", saved_settings).get("vocab_size")
    if saved_size != len(tokenizer):
        raise InputError(
            f"{folder}: this model has a vocabulary of {saved_size} tokens, but the tokenizer has "
            f"{len(tokenizer)}; leave --tokenizer_path out to use the model's own tokenizer"
        )
    saved = build(saved_settings, str(folder / "config.json"), tokenizer)
    config = build(settings, origin, tokenizer) if config_is_given else saved
    task.require_kind(config, origin if config_is_given else str(folder))
    if isinstance(saved, ReformerLMConfig) and isinstance(config, ReformerLMConfig):
        # Of others, names in files and in the model may differ; loading compares them.
        _compare_shapes(folder, config, saved, origin, task)
    elif config.model_type != saved.model_type:
        raise InputError(f"{folder}: this is a {saved.model_type} model, but {origin} describes a {config.model_type}")
    return ModelSource(config, folder, task)


def _read_saved_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no model here (config.json is missing); give a folder that training wrote")
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); give a folder that training wrote") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: is no model's configuration; give a folder that training wrote")
    return settings


def _compare_shapes(folder: Path, config: ReformerLMConfig, saved: ReformerLMConfig, origin: str, task: Task) -> None:
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); give a folder that training wrote") from None
    # The meta device knows shapes and spends no memory.
    with torch.device("meta"):
        model = task.own_class(config)
    # The output matrix, where it is the embedding, is saved once.
    saved_once = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in saved_once}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise InputError(
                f"{folder}: a checkpoint of another shape: {name} is {_shape(shapes.get(name))} there, "
                f"{_shape(wanted.get(name))} by {origin}{_difference(config, saved)}; "
                "leave --model_config out to use the checkpoint's own, or choose another folder"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"


def _difference(config: ReformerLMConfig, saved: ReformerLMConfig) -> str:
    """Name the first settings that differ, because few people know a model by its tensors."""
    ours, theirs = config.to_dict(), saved.to_dict()
    names = [name for name in model_keys()[0] if ours.get(name) != theirs.get(name)]
    described = [f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in sorted(names)]
    return f" ({', '.join(described[:3])})" if described else ""


def load_model(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the model, in float32, on the CPU.

    Args:
        source: From `choose_model`.
        tokenizer: Its special tokens go into the generation settings that are saved with the model.

    Raises:
        InputError: If the weights cannot be read, or are not all there.
    """
    if source.folder is None:
        model = source.task.build(source.config)
    else:
        try:
            with _no_progress_bars():
                model, found = source.task.auto_class.from_pretrained(
                    source.folder,
                    config=source.config,
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{source.folder}: the model cannot be loaded ({one_line(error)[:200]})") from None
        _require_all(source.folder, found)
        for parameter in model.parameters():
            # Out of the mapped file, where it may stand at an odd address: kernels for aligned memory add up in another
            # order, and a resumed run would differ in the last bit from one that never stopped.
            parameter.data = parameter.data.clone()
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SAMPLING,
        )
    return model


def _require_all(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that transformers would have filled up with random ones."""
    for key, problem in (("mismatched_keys", "has another shape"), ("missing_keys", "is missing")):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in found.get(key, ()))
        if names:
            raise InputError(f"{folder}: {names[0]} {problem} there ({len(names)} such tensors); give a whole model")


def train_only(model: PreTrainedModel, pattern: str | None) -> None:
    """Freeze all parameters whose names do not match.

    Args:
        model: Of the run.
        pattern: Regular expression, searched for in names such as ``lm_head.bias``; None trains everything.

    Raises:
        InputError: If nothing matches.
    """
    if pattern is None:
        return
    expression = re.compile(pattern)
    names = [name for name, _ in model.named_parameters()]
    if not any(expression.search(name) for name in names):
        raise InputError(f"--train_only {pattern!r} matches no parameter; their names are like {names[0]}, {names[-1]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(expression.search(name) is not None)


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile fuse activation, gate and dropout of our feed-forward blocks, or another model whole, in place.

    Args:
        model: On its device.

    Raises:
        InputError: If torch cannot compile here.
    """
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=model.device))
    # The compiler's backends have many ways to fail: no C++ compiler, no Triton, a driver that is too old.
    except Exception as error:
        raise InputError(f"--compile: torch cannot compile here ({one_line(error)[:200]}); leave it out") from None
    if not any(isinstance(module, FeedForward) for module in model.modules()):
        model.compile()
        return
    for block in model.modules():
        if isinstance(block, FeedForward):
            block._piece = torch.compile(block._piece)  # type: ignore[method-assign]


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write configuration, weights, generation settings and tokenizer in transformers' format.

    Args:
        folder: That exists.
        model: Whose weights are saved,
        tokenizer: With it,
        weights: Unless they are given here, as of a model that is sharded.
    """
    if weights is not None:
        # Tied parameters are saved once.
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        weights = {name: tensor for name, tensor in weights.items() if name not in tied}
    with _no_progress_bars():
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    # safetensors lets nobody but the owner read its files; they may be read by whoever may read the others.
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars for loading and saving, which would tear the training's own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
