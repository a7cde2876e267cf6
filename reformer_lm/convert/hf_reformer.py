"""transformers' ReformerModelWithLMHead to our model.

Google's reformer-enwik8 and reformer-crime-and-punishment have this form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ReformerConfig

from reformer_lm.config import ReformerLMConfig
from reformer_lm.convert.accounting import Foreign, common_dtype, fill, make_config, make_model
from reformer_lm.convert.reformer_pytorch_options import with_causal_mask
from reformer_lm.convert.safe_loading import read_json, read_tensors
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "swish": "silu"}
_LAYER = re.compile(r"reformer\.encoder\.layers\.(\d+)\.(.+)")
# Within a layer: theirs -> ours.
_OF_LAYER = {
    "attention.layer_norm.weight": "attention_norm.weight",
    "attention.layer_norm.bias": "attention_norm.bias",
    # Of LSH layers.
    "attention.self_attention.query_key.weight": "attention.query_key.weight",
    # Of local layers.
    "attention.self_attention.query.weight": "attention.query_key.weight",
    "attention.self_attention.key.weight": "attention.local_key.weight",
    "attention.self_attention.value.weight": "attention.value.weight",
    "attention.output.dense.weight": "attention.output.weight",
    "feed_forward.layer_norm.weight": "feed_forward_norm.weight",
    "feed_forward.layer_norm.bias": "feed_forward_norm.bias",
    "feed_forward.dense.dense.weight": "feed_forward.inner.weight",
    "feed_forward.dense.dense.bias": "feed_forward.inner.bias",
    "feed_forward.output.dense.weight": "feed_forward.output.weight",
    "feed_forward.output.dense.bias": "feed_forward.output.bias",
}
_OUTSIDE = {
    "reformer.embeddings.word_embeddings.weight": "reformer.token_embedding.weight",
    "reformer.embeddings.position_embeddings.weights.0": "reformer.position_embedding.axial.weights.0",
    "reformer.embeddings.position_embeddings.weights.1": "reformer.position_embedding.axial.weights.1",
    "reformer.embeddings.position_embeddings.embedding.weight": "reformer.position_embedding.absolute.weight",
    "reformer.encoder.layer_norm.weight": "reformer.norm.weight",
    "reformer.encoder.layer_norm.bias": "reformer.norm.bias",
    "lm_head.decoder.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
# Constants that older versions saved: what a forbidden logit is.
_MASK_VALUE = re.compile(r".*\.(self_)?mask_value_float(16|32)")


def from_transformers(
    model_or_folder: PreTrainedModel | str | Path,
    *,
    causal: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> ReformerLMForCausalLM:
    """Our model that computes what a ReformerModelWithLMHead of transformers computes, with its weights.

    Args:
        model_or_folder: The model, or a folder with its config.json and weights (safetensors or torch.save's).
        causal: Give the model the exactly causal mask (``lsh_mask="causal"``) in place of their chunks. That is
            another function of the same weights, which wants fine-tuning; it can be scored exactly and has a cache.
        on_note: Told of what is worth knowing, one line each.

    Returns:
        The model in evaluation mode, in the weights' dtype. With the same rotations its logits are theirs at lengths
        that are a multiple of both chunk lengths, or no longer than the shorter one. The bias of the output layer
        counts here, as when the weights were trained; transformers 5 leaves it out.

    Raises:
        InputError: No such model, an option without counterpart here, or tensors that are missing, unknown or of
            another shape. All are named.
    """
    note = on_note or (lambda line: None)
    if isinstance(model_or_folder, str | Path):
        folder = Path(model_or_folder)
        options = read_json(folder / "config.json")
        state: Mapping[str, Tensor] = read_weights(folder)
    else:
        options, state = model_or_folder.config.to_dict(), model_or_folder.state_dict()
    config = config_of_transformers(options, causal=causal, note=note)
    named, left_over = _by_our_names(state)
    model = make_model(config, common_dtype({name: foreign.tensor for name, foreign in named.items()}))
    fill(model, named, left_over, "transformers' Reformer")
    bias = named["lm_head.bias"].tensor
    if bias.any():
        note("the output layer has a bias: it counts here, as in training; transformers 5 leaves it out of the logits")
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformers folder.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise InputError(f"{folder}: there are no weights ({' or '.join(WEIGHT_FILES[::2])}); copy the folder again")


def config_of_transformers(
    options: Mapping[str, Any], *, causal: bool = False, note: Callable[[str], None] = lambda line: None
) -> ReformerLMConfig:
    """Our configuration of the model that a ReformerConfig describes.

    Args:
        options: its JSON.
        causal: see `from_transformers`.
        note: told of what is worth knowing.

    Raises:
        InputError: it is no ReformerConfig, or an option has no counterpart here.
    """
    if options.get("model_type", "reformer") != "reformer":
        raise InputError(f'model_type is {options["model_type"]!r}; only transformers\' "reformer" is converted')
    try:
        theirs = ReformerConfig(**{name: value for name, value in options.items() if name != "num_hidden_layers"})
    # Its own checks raise what huggingface_hub's dataclasses raise.
    except Exception as error:
        lines = str(error).split("\n")
        raise InputError(f"config.json is no ReformerConfig ({' '.join(lines[:2])}); restore it") from None
    _refuse(theirs)
    kinds, longest = list(theirs.attn_layers), theirs.max_position_embeddings
    fields: dict[str, Any] = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": theirs.num_attention_heads,
        "head_dim": theirs.attention_head_size,
        "intermediate_size": theirs.feed_forward_size,
        "layer_norm_eps": theirs.layer_norm_eps,
        "ff_activation": _ACTIVATIONS[theirs.hidden_act],
        "ff_chunk_size": theirs.chunk_size_feed_forward,
        "hidden_dropout_prob": theirs.hidden_dropout_prob,
        "activation_dropout": theirs.hidden_dropout_prob,
        "attention_dropout": _attention_dropout(theirs, note),
        "initializer_range": theirs.initializer_range,
        "pad_token_id": theirs.pad_token_id,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        # LSH layers.
        "bucket_size": theirs.lsh_attn_chunk_length or theirs.local_attn_chunk_length,
        "num_hashes": theirs.num_hashes,
        "lsh_mask": "chunked",
        "key_norm": "rms_eps",
        "rehash": "step",
        "num_shifted_heads": 0,
        "attention_output_bias": False,
        "full_attention_threshold": theirs.lsh_attn_chunk_length or 0,
        # Local layers.
        "num_local_heads": [theirs.num_attention_heads if kind == "local" else 0 for kind in kinds],
        "local_window": theirs.local_attn_chunk_length,
        "local_keys": "separate",
        "local_rotary": False,
        # Both ends.
        "merge_streams": "concatenate",
        "tie_word_embeddings": False,
        "lm_head_bias": True,
        "position_type": "absolute",
    }
    if theirs.axial_pos_embds:
        shape = list(theirs.axial_pos_shape)
        longest = min(longest, shape[0] * shape[1])
        fields |= {"position_type": "axial", "axial_shape": shape, "axial_dims": list(theirs.axial_pos_embds_dim)}
    fields["max_position_embeddings"] = longest
    if "lsh" in kinds:
        fields["num_buckets"] = _buckets(theirs, longest, note)
    if causal:
        fields |= with_causal_mask(fields["full_attention_threshold"], longest)
    return make_config(fields)


def _refuse(theirs: ReformerConfig) -> None:
    """Names what has no counterpart."""
    kinds = set(theirs.attn_layers)
    problems = []
    if not theirs.is_decoder:
        problems.append("is_decoder is false: such a model sees the future and is no language model")
    if not kinds <= {"lsh", "local"}:
        problems.append(f"attn_layers has {', '.join(sorted(kinds - {'lsh', 'local'}))} besides lsh and local")
    for kind in sorted(kinds & {"lsh", "local"}):
        before, after = getattr(theirs, f"{kind}_num_chunks_before"), getattr(theirs, f"{kind}_num_chunks_after")
        if before != 1:
            problems.append(f"{kind}_num_chunks_before is {before}: chunks look one chunk back here")
        if after:
            problems.append(f"{kind}_num_chunks_after is {after}: no chunk looks ahead here")
    if theirs.tie_word_embeddings:
        problems.append("tie_word_embeddings is true, though the output layer is twice as wide as the embedding")
    if theirs.hidden_act not in _ACTIVATIONS:
        problems.append(f"hidden_act is {theirs.hidden_act!r}: there are {', '.join(_ACTIVATIONS)}")
    if theirs.axial_pos_embds and len(theirs.axial_pos_shape) != 2:
        problems.append(f"axial_pos_shape has {len(theirs.axial_pos_shape)} sides: there are two here")
    if problems:
        raise InputError(f"there is no counterpart here for this Reformer: {'; '.join(problems)}")


def _buckets(theirs: ReformerConfig, longest: int, note: Callable[[str], None]) -> list[int]:
    """The factors of the buckets of a round, as we count: the first one weighs most."""
    given = theirs.num_buckets
    if given is None:
        chunk = theirs.lsh_attn_chunk_length
        # Their rule for the length of the first sequence that a model sees.
        power = max(1, (2 * (longest // chunk)).bit_length() - 1)
        limit = 2 * max(int((theirs.max_position_embeddings // chunk) ** 0.5), chunk)
        given = [2**power] if 2**power <= limit else [2 ** (power // 2), 2 ** (power - power // 2)]
        note(f"num_buckets is not set: {given}, which transformers takes for the longest sequence, is")
    return list(reversed(given)) if isinstance(given, list | tuple) else [given]


def _attention_dropout(theirs: ReformerConfig, note: Callable[[str], None]) -> float:
    """Theirs may differ between local and LSH layers; there is one here."""
    by_kind = {
        "local": theirs.local_attention_probs_dropout_prob,
        "lsh": theirs.lsh_attention_probs_dropout_prob or 0.0,
    }
    values = {by_kind[kind] for kind in theirs.attn_layers}
    if len(values) > 1:
        note(
            f"attention dropout is {by_kind['lsh']} in LSH and {by_kind['local']} in local layers; for training here "
            f"it is {max(values)} in both (attention_dropout)"
        )
    return float(max(values))


def _by_our_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Foreign], dict[str, Tensor]]:
    named: dict[str, Foreign] = {}
    left_over: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = our_name(name)
        if ours is not None:
            # Before transformers 5 the output layer's bias stood there twice.
            named[ours] = Foreign(name, tensor.unsqueeze(0) if ".axial." in ours else tensor)
        elif name == "lm_head.decoder.bias" and tensor.equal(state.get("lm_head.bias", tensor)):
            named.setdefault("lm_head.bias", Foreign(name, tensor))
        elif not (_MASK_VALUE.fullmatch(name) and tensor.numel() == 1):
            left_over[name] = tensor
    return named, left_over


def our_name(theirs: str) -> str | None:
    """Our name of a parameter of ReformerModelWithLMHead, None if it is none."""
    match = _LAYER.fullmatch(theirs)
    if match is None:
        return _OUTSIDE.get(theirs)
    ours = _OF_LAYER.get(match[2])
    return None if ours is None else f"reformer.stack.layers.{match[1]}.{ours}"
