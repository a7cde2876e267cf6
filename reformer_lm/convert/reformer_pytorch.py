"""reformer-pytorch's ReformerLM to our model and back.

The package itself is not needed: a live module is read by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reformer_lm.convert.accounting import Foreign, common_dtype, fill, make_model
from reformer_lm.convert.reformer_pytorch_names import in_first_layer, of_irreversible_twin, our_name, their_name
from reformer_lm.convert.reformer_pytorch_options import (
    check_values,
    complete_options,
    config_of_options,
    options_of_config,
)
from reformer_lm.convert.reformer_pytorch_reading import (
    bare_names,
    find_reformer_lm,
    options_of_module,
    with_what_shapes_say,
)
from reformer_lm.errors import InputError
from reformer_lm.layers.positions import rotary_frequencies
from reformer_lm.model import ReformerLMForCausalLM

_FREQUENCIES = ("layer_pos_emb.inv_freq", "pos_emb.inv_freq")


def from_reformer_pytorch(
    module_or_state_dict: nn.Module | Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    *,
    causal: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> ReformerLMForCausalLM:
    """Our model that computes what a ReformerLM computes, with its weights.

    Args:
        module_or_state_dict: A ``reformer_pytorch.ReformerLM``, its ``TrainingWrapper``, or the state dict of either,
            DataParallel's or Lightning's prefixes before the names or not.
        options: With a state dict: the arguments that ReformerLM was made with, as keywords. What is left out is read
            off the shapes where these tell it, and is ReformerLM's default elsewhere: shapes say nothing of ``heads``,
            ``bucket_size``, ``n_hashes``, ``full_attn_thres`` and dropouts. A live module has its options itself.
        causal: Give the model the exactly causal mask (``lsh_mask="causal"``) in place of their chunks. That is
            another function of the same weights, which wants fine-tuning; it can be scored exactly and has a cache.
        on_note: Told of what is worth knowing, one line each.

    Returns:
        The model in evaluation mode, in the weights' dtype. With the same rotations its logits are theirs; which
        rotations they draw, anew in each forward pass, nobody can know, so ours are drawn from ``hash_seed``.

    Raises:
        InputError: An option has no counterpart here, options and weights contradict each other, or tensors are
            missing, unknown or of another shape. All are named.
    """
    note = on_note or (lambda line: None)
    if isinstance(module_or_state_dict, nn.Module):
        if options is not None:
            raise InputError("a module has its options itself: leave options out, or give module.state_dict()")
        module = find_reformer_lm(module_or_state_dict)
        options = options_of_module(module)
        state: Mapping[str, Tensor] = module.state_dict()
    else:
        check_values(options or {})
        state, other = bare_names(module_or_state_dict)
        if other:
            raise InputError(f"these tensors are not of a ReformerLM: {', '.join(other)}; give its state dict alone")
        options = with_what_shapes_say(options or {}, state, note)
    options = complete_options(options)
    config = config_of_options(options, causal=causal)
    named, left_over = _by_our_names(state, options)
    model = make_model(config, common_dtype(state))
    fill(model, named, left_over, "ReformerLM")
    return model


def to_reformer_pytorch(model: ReformerLMForCausalLM) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the options of the ReformerLM that computes what our model computes.

        state, options = to_reformer_pytorch(model)
        peer = ReformerLM(**options)
        peer.load_state_dict(state)

    An activation other than GELU is given by its name ("ReLU"), where ReformerLM wants the class of ``torch.nn``;
    ``lsh_attend_across_buckets`` and ``lsh_allow_duplicate_attention``, there only where they are false, belong to
    Reformer. From JSON ``pkm_layers`` and ``axial_position_shape`` come as lists, and ReformerLM wants tuples (of a
    list of ``pkm_layers`` it would make ordinary layers without a word).

    Args:
        model: Ours.

    Returns:
        Tensors by ReformerLM's names, on the CPU, copies; and its options, which fit into JSON.

    Raises:
        InputError: The model has no counterpart there; the fields that stand in the way are named.
    """
    config = model.config
    options = options_of_config(config)
    parameters = dict(model.named_parameters())
    if not config.unit_output_vectors:
        # They have no output tied as ours is, but their own holds any matrix; so with a bias of 0.
        parameters.setdefault("lm_head.weight", model.lm_head.weight)
        parameters.setdefault("lm_head.bias", nn.Parameter(model.lm_head.weight.new_zeros(config.vocab_size)))
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach().cpu().clone()
        theirs = their_name(name, config)
        state[theirs] = tensor.unsqueeze(0) if theirs.endswith(".mem_kv") else tensor
    if config.share_layer_weights:
        for layer in range(1, config.num_hidden_layers):
            for name in [name for name in state if in_first_layer(name) == name and ".blocks.0." in name]:
                copy = name.replace(".blocks.0.", f".blocks.{layer}.")
                if in_first_layer(copy) == name:
                    state[copy] = state[name]
    state |= {of_irreversible_twin(name): tensor for name, tensor in state.items()}
    if config.unit_output_vectors:
        state["out.1.tensor"] = state["token_emb.weight"]
    if config.position_type in ("rotary", "sinusoidal"):
        rotary = config.position_type == "rotary"
        width = config.head_dim if rotary else config.embedding_size
        assert width is not None
        state[_FREQUENCIES[0 if rotary else 1]] = rotary_frequencies(width).to(model.dtype)
    return state, options


def _by_our_names(
    state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Foreign], dict[str, Tensor]]:
    """Sorts a state dict: tensors by our name, and those that nobody could name.

    What stands there twice is compared and dropped.

    Raises:
        InputError: two tensors that should be one differ, or position frequencies are not the usual ones.
    """
    named: dict[str, Foreign] = {}
    left_over: dict[str, Tensor] = {}
    twins = {twin: name for name in state if (twin := of_irreversible_twin(name)) != name}
    for name, tensor in state.items():
        original = twins.get(name, name)
        if name == "out.1.tensor" and options["weight_tie_embedding"]:
            original = "token_emb.weight"
        elif options["weight_tie"] and original == name:
            original = in_first_layer(name)
        if original != name:
            if original not in state or not torch.equal(state[original], tensor):
                raise InputError(
                    f"{name} is not equal to {original}, though the options say that they are one; check "
                    "weight_tie and weight_tie_embedding"
                )
        elif name in _FREQUENCIES:
            _check_frequencies(name, tensor)
        elif (ours := our_name(name)) is None:
            left_over[name] = tensor
        else:
            named[ours] = Foreign(name, tensor)
    return named, left_over


def _check_frequencies(name: str, frequencies: Tensor) -> None:
    expected = rotary_frequencies(2 * len(frequencies))
    # Half precision is what a whole model's .half() makes of them.
    if frequencies.dim() != 1 or not torch.allclose(frequencies.double(), expected, rtol=1e-2, atol=1e-7):
        raise InputError(f"{name}: positions have other frequencies than 10000 ** -(2i / d); there is no counterpart")
