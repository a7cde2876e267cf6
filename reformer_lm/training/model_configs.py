"""The configuration of a run's model, ours or any causal language model of transformers', from a file's settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reformer_lm.command_line import nearest_name
from reformer_lm.config import ReformerLMConfig
from reformer_lm.encoder_decoder import ReformerEncDecConfig
from reformer_lm.errors import InputError
from reformer_lm.training.arguments import FIELDS

# What GPT-2's configurations, GPT2-Chinese's among them, call our fields.
GPT2_NAMES = {
    "n_ctx": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "ff_activation",
    "embd_pdrop": "hidden_dropout_prob",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_dropout",
}


def model_keys() -> tuple[set[str], set[str]]:
    """The keys a configuration may have: the model's own, and those that every transformers model has."""
    own = set(inspect.signature(ReformerLMConfig.__init__).parameters) - {"self", "kwargs"}
    inherited = set(ReformerLMConfig().to_dict()) - own
    return own, inherited | {"bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"}


def build_config(settings: Mapping[str, Any], origin: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Make a model's configuration from a file's settings and the tokenizer's size and special tokens.

    Args:
        settings: The model part of a configuration file, or a saved config.json. With a ``model_type`` other than ours
            (GPT-2's configurations may leave it out where ``architectures`` says it) it is that model's.
        origin: The file's name, for messages.
        tokenizer: Gives the vocabulary's size and the ids of bos, eos and pad.

    Raises:
        InputError: On an unknown key or model, an impossible combination, or a vocabulary of another size.
    """
    model_type = _model_type(settings)
    if model_type == ReformerLMConfig.model_type:
        kind: type[PretrainedConfig] = ReformerLMConfig
        own, inherited = model_keys()
    else:
        kind, own, inherited = _other_kind(model_type, origin)
    for key in settings:
        if key not in own | inherited:
            raise InputError(f"{origin}: unknown model key {key!r}; {_what_was_meant(key, own)}")
    vocabulary_size = settings.get("vocab_size", len(tokenizer))
    if vocabulary_size != len(tokenizer):
        raise InputError(
            f"{origin}: vocab_size is {vocabulary_size}, but the tokenizer has {len(tokenizer)} tokens; "
            "leave vocab_size out, or give the matching --tokenizer_path"
        )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return kind(**{**settings, "vocab_size": len(tokenizer), **special})
    # Other models' configurations say no in ways of their own.
    except Exception as error:
        raise InputError(f"{origin}: {one_line(error)}") from None


def build_encoder_decoder_config(
    settings: Mapping[str, Any], origin: str, tokenizer: PreTrainedTokenizerFast
) -> ReformerEncDecConfig:
    """Make the configuration of an encoder-decoder: see `build_config`.

    Args:
        settings: Those of a language model, which is then the decoder, with a bidirectional encoder of the same
            sizes; or a saved config.json with both parts.
        origin: The file's name, for messages.
        tokenizer: Of both.

    Raises:
        InputError: As `build_config`.
    """
    model_type = _model_type(settings)
    if model_type == ReformerEncDecConfig.model_type:
        parts = [settings.get("encoder"), settings.get("decoder")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise InputError(f"{origin}: a {model_type} has an encoder and a decoder part; give both")
    elif model_type == ReformerLMConfig.model_type:
        encoder = {key: value for key, value in settings.items() if key != "num_shifted_heads"}
        parts = [{**encoder, "causal": False, "lsh_mask": "chunked"}, settings]
    else:
        raise InputError(
            f"{origin}: --task seq2seq trains models of this package, not a {model_type}; leave model_type out"
        )
    built = [build_config(part, origin, tokenizer) for part in parts if part is not None]
    try:
        return ReformerEncDecConfig(*built)  # type: ignore[arg-type]  # of our type, as both parts are
    except ValueError as error:
        raise InputError(f"{origin}: {one_line(error)}") from None


def _model_type(settings: Mapping[str, Any]) -> str:
    if "model_type" not in settings and "GPT2LMHeadModel" in settings.get("architectures", ()):
        return "gpt2"
    return str(settings.get("model_type", ReformerLMConfig.model_type))


# Keys that older versions of transformers wrote, and nobody reads any more.
_OF_OLDER_VERSIONS = ("n_ctx", "output_past", "task_specific_params", "gradient_checkpointing")


def _other_kind(model_type: str, origin: str) -> tuple[type[PretrainedConfig], set[str], set[str]]:
    """Class and keys of a configuration of transformers'."""
    known = [ReformerLMConfig.model_type, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if model_type not in known:
        raise InputError(
            f"{origin}: transformers has no causal language model of model_type {model_type!r}; "
            f"did you mean {nearest_name(model_type, known)!r}?"
        )
    kind = CONFIG_MAPPING[model_type]
    # GPT-2's n_embd is also known as hidden_size, and so on. Keys of older versions may come with a saved model.
    own = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"} | set(kind.attribute_map)
    own |= set(kind().to_dict())
    return kind, own, {"torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", *_OF_OLDER_VERSIONS}


def _what_was_meant(key: str, own: set[str]) -> str:
    if key in GPT2_NAMES and GPT2_NAMES[key] in own:
        return f'here it is called {GPT2_NAMES[key]!r} (for a GPT-2, add "model_type": "gpt2")'
    if key in FIELDS:
        return f'{key!r} is a training option: put it into a part "training", beside a part "model"'
    return f"did you mean {nearest_name(key, sorted(own))!r}?"


def one_line(error: BaseException) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())
