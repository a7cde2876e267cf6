"""Filling a model with tensors from elsewhere, so that every one of them is accounted for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reformer_lm.config import ReformerLMConfig
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM


@dataclass(frozen=True)
class Foreign:
    """A tensor of another package's model.

    Attributes:
        name: its name there.
        tensor: its value.
    """

    name: str
    tensor: Tensor


def make_config(fields: Mapping[str, object]) -> ReformerLMConfig:
    """A configuration of translated options.

    Raises:
        InputError: they are impossible together.
    """
    try:
        return ReformerLMConfig(**fields)  # type: ignore[arg-type]  # checked by the configuration itself
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"these options make no model here: {error}") from None


def make_model(config: ReformerLMConfig, dtype: torch.dtype) -> ReformerLMForCausalLM:
    """A model in evaluation mode, whose weights are to be filled in."""
    with torch.random.fork_rng(devices=[]):
        return ReformerLMForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def fill(model: nn.Module, given: Mapping[str, Foreign], left_over: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into a model, if they are exactly the ones that it has.

    Args:
        model: whose parameters are filled.
        given: by our name of the parameter. A dimension of 1 in front may be there in addition.
        left_over: what nobody could name.
        source: whose tensors these are, for the error.

    Raises:
        InputError: tensors are missing, unknown or of another shape; all of them are named.
    """
    parameters = dict(model.named_parameters())
    problems = []
    missing = [name for name in parameters if name not in given]
    if missing:
        problems.append(f"missing (by their names here): {', '.join(missing)}")
    unknown = [*left_over, *(foreign.name for name, foreign in given.items() if name not in parameters)]
    if unknown:
        problems.append(f"unknown: {', '.join(unknown)}")
    wrong = []
    for name, parameter in parameters.items():
        if name in given and given[name].tensor.shape not in (parameter.shape, (1, *parameter.shape)):
            foreign = given[name]
            wrong.append(f"{foreign.name} {list(foreign.tensor.shape)} instead of {list(parameter.shape)}")
    if wrong:
        problems.append(f"of another shape: {', '.join(wrong)}")
    if problems:
        raise InputError(
            f"the weights are not those of the model that the options of {source} describe; {'; '.join(problems)}"
        )
    for name, parameter in parameters.items():
        parameter.copy_(given[name].tensor.view_as(parameter))


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating point type that holds all of some tensors."""
    found = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, found) if found else torch.float32
