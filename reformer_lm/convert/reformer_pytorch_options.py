"""reformer-pytorch's options and our configuration, both ways.

Options are the arguments of ReformerLM, and two of Reformer that ReformerLM does not pass on
(``lsh_attend_across_buckets``, ``lsh_allow_duplicate_attention``). Where JSON cannot hold a value its name stands in:
"ReLU" for ``torch.nn.ReLU``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reformer_lm.command_line import nearest_name
from reformer_lm.config import ReformerLMConfig
from reformer_lm.convert.accounting import make_config
from reformer_lm.errors import InputError

# As in version 1.4.4; None: no default. Version by version other defaults held, so files should say what they mean.
DEFAULTS: dict[str, Any] = {
    "num_tokens": None, "dim": None, "depth": None, "max_seq_len": None, "heads": 8, "dim_head": 64,
    "bucket_size": 64, "n_hashes": 4, "ff_chunks": 100, "attn_chunks": 1, "causal": False, "weight_tie": False,
    "lsh_dropout": 0.0, "ff_dropout": 0.0, "ff_mult": 4, "ff_activation": None, "ff_glu": False,
    "post_attn_dropout": 0.0, "layer_dropout": 0.0, "random_rotations_per_head": False, "use_scale_norm": False,
    "use_rezero": False, "use_full_attn": False, "full_attn_thres": 0, "reverse_thres": 0, "num_mem_kv": 0,
    "one_value_head": False, "emb_dim": None, "return_embeddings": False, "weight_tie_embedding": False,
    "fixed_position_emb": False, "absolute_position_emb": False, "axial_position_emb": False,
    "axial_position_shape": None, "n_local_attn_heads": 0, "pkm_layers": (), "pkm_num_keys": 128,
    # Of Reformer.
    "lsh_attend_across_buckets": True, "lsh_allow_duplicate_attention": True,
}  # fmt: skip

# Their name -> ours, with the same meaning.
_SAME_MEANING = {
    "num_tokens": "vocab_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
    "heads": "num_attention_heads",
    "dim_head": "head_dim",
    "bucket_size": "bucket_size",
    "n_hashes": "num_hashes",
    "weight_tie": "share_layer_weights",
    "lsh_dropout": "attention_dropout",
    "ff_dropout": "activation_dropout",
    "layer_dropout": "layer_dropout",
    "full_attn_thres": "full_attention_threshold",
    "reverse_thres": "reversible_threshold",
    "num_mem_kv": "num_mem_kv",
    "one_value_head": "one_value_head",
    "n_local_attn_heads": "num_local_heads",
    "lsh_attend_across_buckets": "attend_across_buckets",
    "lsh_allow_duplicate_attention": "allow_duplicate_attention",
}
# The first of these that is set, in their order; none of them means rotary.
_POSITIONS = {
    "axial_position_emb": "axial",
    "absolute_position_emb": "absolute",
    "fixed_position_emb": "sinusoidal",
}
# (name of the activation's class, gated) -> ours.
_ACTIVATIONS = {
    ("GELU", False): "gelu",
    ("GELU_", False): "gelu_tanh",
    ("ReLU", False): "relu",
    ("SiLU", False): "silu",
    ("GELU", True): "geglu",
    ("ReLU", True): "reglu",
    ("SiLU", True): "swiglu",
}
_AT_LEAST_ONE = (
    "num_tokens", "dim", "depth", "max_seq_len", "heads", "dim_head", "bucket_size", "n_hashes", "ff_chunks",
    "attn_chunks", "ff_mult", "emb_dim", "pkm_num_keys",
)  # fmt: skip
_AT_LEAST_ZERO = ("full_attn_thres", "reverse_thres", "num_mem_kv", "n_local_attn_heads")
# Longer than any sequence: use_full_attn as a threshold.
_ALWAYS_FULL = 1 << 30
# What their models have, whatever the options: fields of ours with their only value.
_FIXED = {
    "lsh_mask": "chunked",
    "key_norm": "unit",
    "local_keys": "shared",
    "local_rotary": False,
    "num_shifted_heads": 0,
    "num_buckets": None,
    "attention_output_bias": True,
    "merge_streams": "mean",
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "axial_dims": None,
}


def complete_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in what is left out with ReformerLM's defaults.

    Raises:
        InputError: an unknown option, one without default left out, or one that no model here can follow.
    """
    check_values(options)
    full = DEFAULTS | dict(options)
    for name in ("num_tokens", "dim", "depth", "max_seq_len"):
        if full[name] is None:
            raise InputError(f"the options lack {name!r}, which has no default: add it to the file of options")
    full["emb_dim"] = full["emb_dim"] or full["dim"]
    full["attn_chunks"] = full["attn_chunks"] or 1
    full["dim_head"] = full["dim_head"] or full["dim"] // full["heads"]
    layers = full["pkm_layers"]
    full["pkm_layers"] = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
    _refuse(full)
    return full


def check_values(options: Mapping[str, Any]) -> None:
    """Makes sure that options, whether complete or not, are ReformerLM's and of the right kind.

    Raises:
        InputError: one is not.
    """
    for name, value in options.items():
        if name not in DEFAULTS:
            raise InputError(
                f"{name!r} is no option of ReformerLM; did you mean {nearest_name(name, DEFAULTS)!r}? Leave out what "
                "is not one"
            )
        wanted = None
        if name in _AT_LEAST_ONE and value is not None:
            wanted = "a whole number of at least 1" if not _is_whole(value, 1) else None
        elif name in _AT_LEAST_ZERO:
            wanted = "a whole number of at least 0" if not _is_whole(value, 0) else None
        elif isinstance(DEFAULTS[name], bool):
            wanted = "true or false" if not isinstance(value, bool) else None
        elif name == "axial_position_shape" and value is not None:
            wanted = "a list of two whole numbers" if not _are_whole(value, 2) else None
        elif name == "pkm_layers" and not _is_whole(value, 1):
            wanted = "a list of layers, counted from 1" if not _are_whole(value) else None
        if wanted:
            raise InputError(f"the option {name} is {value!r}; it must be {wanted}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_whole(values: Any, count: int | None = None) -> bool:
    is_list = isinstance(values, list | tuple) and count in (None, len(values))
    return is_list and all(_is_whole(value, 1) for value in values)


def _refuse(options: Mapping[str, Any]) -> None:
    if not options["causal"]:
        raise InputError(
            "causal is false, or left out: such a model sees the future and is no language model; if it was trained "
            'as one, add "causal": true'
        )
    if options["return_embeddings"]:
        raise InputError("return_embeddings is set: a model without an output layer has no counterpart here")
    if options["pkm_layers"] and options["weight_tie"]:
        raise InputError(
            "pkm_layers together with weight_tie has no counterpart here: layers of two kinds share nothing"
        )


def config_of_options(options: Mapping[str, Any], *, causal: bool = False) -> ReformerLMConfig:
    """Our configuration of the model that ``ReformerLM(**options)`` is.

    Args:
        options: arguments of ReformerLM; what is left out has its default. See the module's docstring.
        causal: whether to give it the exactly causal mask in place of their chunks. That is another function, with
            the same weights.

    Raises:
        InputError: see `complete_options`.
    """
    options = complete_options(options)
    fields: dict[str, Any] = _FIXED | {ours: options[theirs] for theirs, ours in _SAME_MEANING.items()}
    fields |= {
        "intermediate_size": options["ff_mult"] * options["dim"],
        "embedding_size": options["emb_dim"],
        # Their number of pieces, as a length.
        "ff_chunk_size": 0 if options["ff_chunks"] == 1 else -(-options["max_seq_len"] // options["ff_chunks"]),
        "attn_chunks": min(options["attn_chunks"], options["heads"]),
        "ff_activation": _activation(options["ff_activation"], bool(options["ff_glu"])),
        "position_type": next((kind for name, kind in _POSITIONS.items() if options[name]), "rotary"),
        "product_key_layers": [layer - 1 for layer in options["pkm_layers"]],
        "product_keys": options["pkm_num_keys"],
        # They draw new rotations in every forward pass.
        "rehash": "step",
        "tie_word_embeddings": options["weight_tie_embedding"],
        "unit_output_vectors": options["weight_tie_embedding"],
        "lm_head_bias": not options["weight_tie_embedding"],
    }
    if fields["position_type"] == "axial":
        fields["axial_shape"] = options["axial_position_shape"]
    if options["use_scale_norm"]:
        fields["norm_type"] = "scalenorm"
    if options["use_rezero"]:
        fields["norm_type"] = "rezero"
    if options["use_full_attn"]:
        fields["full_attention_threshold"] = _ALWAYS_FULL
    if causal:
        fields |= with_causal_mask(fields["full_attention_threshold"], options["max_seq_len"])
    return make_config(fields)


def with_causal_mask(full_attention_threshold: int, longest: int) -> dict[str, Any]:
    """Fields that turn a chunked model's configuration into an exactly causal one's.

    Args:
        full_attention_threshold: of the chunked model, which is one of lengths; here it is one of positions.
        longest: the model's longest sequence.
    """
    return {"lsh_mask": "causal", "full_attention_threshold": min(full_attention_threshold, longest)}


def _activation(given: Any, gated: bool) -> str:
    name = "GELU" if given is None else given if isinstance(given, str) else getattr(given, "__name__", repr(given))
    known = {key[0].lower(): key[0] for key in _ACTIVATIONS}
    found = _ACTIVATIONS.get((known.get(name.lower(), name), gated))
    if found is None:
        shown = f"ff_activation={name} with ff_glu={gated}"
        raise InputError(f"{shown} has no counterpart here; there are {', '.join(sorted(set(known.values())))}")
    return found


def options_of_config(config: ReformerLMConfig) -> dict[str, Any]:
    """The options of the ReformerLM that computes the same function; all of them fit into JSON.

    Raises:
        InputError: there is none, because of fields that are named with the values they would need.
    """
    _require_counterparts(config)
    gated = {ours: key for key, ours in _ACTIVATIONS.items()}
    activation, glu = gated[config.ff_activation]
    longest = config.max_position_embeddings
    options: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _SAME_MEANING.items()}
    assert config.intermediate_size is not None
    options |= {
        "causal": True,
        "ff_mult": config.intermediate_size // config.hidden_size,
        "ff_glu": glu,
        "ff_chunks": -(-longest // config.ff_chunk_size) if config.ff_chunk_size else 1,
        "attn_chunks": config.attn_chunks,
        "emb_dim": config.embedding_size,
        "pkm_layers": tuple(layer + 1 for layer in sorted(config.product_key_layers)),
        "pkm_num_keys": config.product_keys,
        "use_scale_norm": config.norm_type == "scalenorm",
        "use_rezero": config.norm_type == "rezero",
        "weight_tie_embedding": config.unit_output_vectors,
        **{name: config.position_type == kind for name, kind in _POSITIONS.items()},
    }
    if isinstance(config.num_local_heads, list):
        options["n_local_attn_heads"] = config.num_local_heads[0]
    if config.position_type == "axial":
        options["axial_position_shape"] = tuple(config.axial_shape or ())
    if config.full_attention_threshold >= _ALWAYS_FULL:
        options |= {"use_full_attn": True, "full_attn_thres": 0}
    if config.reversible == "off":
        options["reverse_thres"] = longest
    if activation != "GELU":
        options["ff_activation"] = activation
    # What ReformerLM has no argument for may only be said where it is not the default.
    return {name: value for name, value in options.items() if not name.startswith("lsh_a") or not value}


def _require_counterparts(config: ReformerLMConfig) -> None:
    """Names every field that stands in the way."""
    wrong = []

    def require(name: str, wanted: Any, holds: bool) -> None:
        if not holds:
            wrong.append(f"{name} is {getattr(config, name)!r}, theirs is always {wanted}")

    heads = config.num_local_heads
    local = set(heads) if isinstance(heads, list) else {heads}
    shifted = config.num_shifted_heads
    for name, value in _FIXED.items():
        if name == "num_shifted_heads":
            require(name, 0, not any(shifted) if isinstance(shifted, list) else not shifted)
        elif name not in ("local_keys", "local_rotary") or local != {0}:
            require(name, repr(value), getattr(config, name) == value)
    require("num_local_heads", "one number, below that of the heads", len(local) == 1)
    require("num_local_heads", "below num_attention_heads", config.num_attention_heads not in local)
    if local != {0}:
        require(
            "local_window", f"2 * bucket_size ({2 * config.bucket_size})", config.local_window == 2 * config.bucket_size
        )
    require("position_type", "another", config.position_type != "none")
    assert config.intermediate_size is not None
    whole = config.intermediate_size % config.hidden_size == 0
    require("intermediate_size", f"a multiple of hidden_size ({config.hidden_size})", whole)
    if config.unit_output_vectors:
        require("tie_word_embeddings", "True with unit_output_vectors", config.tie_word_embeddings)
        require("lm_head_bias", "False with unit_output_vectors", not config.lm_head_bias)
    if wrong:
        hint = ""
        if config.lsh_mask == "causal":
            hint = '; a model trained with lsh_mask="causal" has no equal there: their chunks are another function'
        raise InputError(f"reformer-pytorch has no counterpart for this model: {'; '.join(wrong)}{hint}")
