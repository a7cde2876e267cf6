"""What a ReformerLM, or its state dict alone, tells of the options that it was made with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from reformer_lm.errors import InputError

_BLOCK = re.compile(r"reformer\.layers\.blocks\.(\d+)\.")
_FIRST = "token_emb.weight"


def bare_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Takes the prefix of wrappers (``net.net.``, ``module.``) off the names of a ReformerLM's tensors.

    Returns:
        The tensors that have the prefix, without it; and the names of the others.

    Raises:
        InputError: there is no ReformerLM among them, or more than one.
    """
    prefixes = [name.removesuffix(_FIRST) for name in state if name == _FIRST or name.endswith(f".{_FIRST}")]
    if not prefixes:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise InputError(f"this is no state dict of a ReformerLM: it has no {_FIRST}, but {some}")
    if len(prefixes) > 1:
        raise InputError(
            f"there are several models in this state dict ({', '.join(prefixes)}): an encoder and decoder pair is no "
            "language model"
        )
    prefix = prefixes[0]
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return bare, [name for name in state if not name.startswith(prefix)]


def with_what_shapes_say(
    options: Mapping[str, Any], state: Mapping[str, Tensor], note: Callable[[str], None]
) -> dict[str, Any]:
    """Completes options by what the tensors of a state dict tell.

    Args:
        options: arguments of ReformerLM, some left out.
        state: tensors by ReformerLM's names.
        note: told what ``heads`` was taken to be.

    Raises:
        InputError: a given option contradicts the tensors, or the tensors are not of a ReformerLM.
    """
    told = _options_of_shapes(state)
    for name, value in told.items():
        given = options.get(name)
        if given is not None and _plain(given) != _plain(value):
            raise InputError(
                f"the options say {name}={given!r}, but the weights {value!r}; one of them is of another model"
            )
    full = dict(options) | told
    rows = state["reformer.layers.blocks.0.f.net.fn.toqk.weight"].shape[0]
    if full.get("heads") is None and full.get("dim_head"):
        full["heads"] = rows // full["dim_head"]
    elif full.get("heads") is None:
        full["heads"] = 8
        note("the options lack heads; taken to be 8, ReformerLM's default, which the weights neither confirm nor deny")
    if full.get("dim_head") is None:
        full["dim_head"] = rows // full["heads"]
    if full["heads"] * full["dim_head"] != rows:
        raise InputError(
            f"heads={full['heads']} with dim_head={full['dim_head']} makes {full['heads'] * full['dim_head']} columns, "
            f"but the weights (toqk) have {rows}; correct the options"
        )
    return full


def _options_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options that follow from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise InputError(f"this is no complete state dict of a ReformerLM: it lacks {name}")
        return tuple(state[name].shape)

    first = "reformer.layers.blocks.0."
    layers = {int(match[1]) for name in state if (match := _BLOCK.match(name))}
    dim = shape("norm.weight")[0]
    told: dict[str, Any] = {
        "num_tokens": shape(_FIRST)[0],
        "emb_dim": shape(_FIRST)[1],
        "dim": dim,
        "depth": max(layers, default=-1) + 1,
        "num_mem_kv": shape(first + "f.net.fn.mem_kv")[1] if first + "f.net.fn.mem_kv" in state else 0,
        "one_value_head": shape(first + "f.net.fn.tov.weight") != shape(first + "f.net.fn.toqk.weight"),
        "use_rezero": first + "f.net.g" in state,
        "weight_tie_embedding": "out.1.tensor" in state,
        "return_embeddings": not any(name.startswith("out.") for name in state),
    }
    if not told["use_rezero"]:
        told["use_scale_norm"] = first + "f.net.norm.g" in state
    memories = [layer for layer in sorted(layers) if f"reformer.layers.blocks.{layer}.g.net.fn.keys" in state]
    if memories:
        told["pkm_layers"] = tuple(layer + 1 for layer in memories)
        told["pkm_num_keys"] = shape(f"reformer.layers.blocks.{memories[0]}.g.net.fn.keys")[1]
    ordinary = next((layer for layer in sorted(layers) if layer not in memories), None)
    if ordinary is not None:
        block = f"reformer.layers.blocks.{ordinary}.g.net.fn.fn."
        inner = shape(block + "w2.weight")[1]
        told |= {"ff_mult": inner // dim, "ff_glu": shape(block + "w1.weight")[0] == 2 * inner}
    told |= _positions_of_shapes(state, shape)
    return told


def _positions_of_shapes(state: Mapping[str, Tensor], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Any]:
    kinds = {
        "axial_position_emb": "pos_emb.weights.0",
        "absolute_position_emb": "pos_emb.emb.weight",
        "fixed_position_emb": "pos_emb.inv_freq",
    }
    found = {name for name, tensor in kinds.items() if tensor in state}
    rotary = "layer_pos_emb.inv_freq" in state
    if not (found or rotary):
        # Parameters alone: fixed or rotary, which the options must tell.
        return {"axial_position_emb": False, "absolute_position_emb": False}
    told: dict[str, Any] = dict.fromkeys(found, True)
    if rotary:
        told = dict.fromkeys(kinds, False) | {"dim_head": 2 * shape("layer_pos_emb.inv_freq")[0]}
    if "absolute_position_emb" in found:
        told["max_seq_len"] = shape("pos_emb.emb.weight")[0]
    if "axial_position_emb" in found:
        told["axial_position_shape"] = (shape("pos_emb.weights.0")[1], shape("pos_emb.weights.1")[2])
    return told


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def find_reformer_lm(module: nn.Module) -> Any:
    """The ReformerLM inside of a TrainingWrapper, an Autopadder or DataParallel, or the module itself.

    Raises:
        InputError: there is none.
    """
    found: Any = module
    while not (hasattr(found, "token_emb") and hasattr(found, "reformer")):
        inner = getattr(found, "net", None) or getattr(found, "module", None)
        if not isinstance(inner, nn.Module):
            raise InputError(
                f"a {type(module).__name__} is no ReformerLM and holds none; give one, or its TrainingWrapper"
            )
        found = inner
    return found


def options_of_module(module: Any) -> dict[str, Any]:
    """The options of a live ReformerLM, read off its attributes.

    Raises:
        InputError: something was set by hand that no option sets, or layers differ.
    """
    blocks = [(block.f.net, block.g.net) for block in module.reformer.layers.blocks]
    attention, feed_forward = blocks[0][0].fn, blocks[0][1].fn
    memories = tuple(index + 1 for index, (_, g) in enumerate(blocks) if hasattr(g.fn, "num_memories"))
    chunks = next((g.fn for index, (_, g) in enumerate(blocks) if index + 1 not in memories), None)
    positions, output = type(module.pos_emb).__name__, module.out
    options = {
        "num_tokens": module.token_emb.num_embeddings,
        "emb_dim": module.token_emb.embedding_dim,
        "dim": module.reformer.dim,
        "depth": len(blocks),
        "max_seq_len": module.max_seq_len,
        **_options_of_attention(attention),
        "weight_tie": len(blocks) > 1 and blocks[1][0].fn is attention,
        "layer_dropout": module.reformer.layers.layer_dropout,
        "reverse_thres": module.reformer.layers.reverse_thres,
        "use_rezero": hasattr(blocks[0][0], "g"),
        "use_scale_norm": hasattr(getattr(blocks[0][0], "norm", None), "g"),
        "axial_position_emb": positions == "AxialPositionalEmbedding",
        "absolute_position_emb": positions == "AbsolutePositionalEmbedding",
        "fixed_position_emb": positions == "FixedPositionalEmbedding",
        "return_embeddings": not isinstance(output, nn.Sequential),
        "weight_tie_embedding": isinstance(output, nn.Sequential) and hasattr(output[1], "tensor"),
        "pkm_layers": memories,
    }
    if options["axial_position_emb"]:
        options["axial_position_shape"] = tuple(module.pos_emb.shape)
    if memories:
        options["pkm_num_keys"] = blocks[memories[0] - 1][1].fn.num_keys
    if chunks is not None:
        feed_forward = chunks.fn
        options |= {
            "ff_chunks": chunks.chunks,
            "ff_glu": feed_forward.glu,
            "ff_mult": feed_forward.w2.in_features // module.reformer.dim,
            "ff_dropout": feed_forward.dropout.p,
            "ff_activation": type(feed_forward.act),
        }
    for f, _ in blocks:
        if _options_of_attention(f.fn) != _options_of_attention(attention):
            raise InputError("the layers of this ReformerLM differ in their attention: there is no counterpart")
    return options


def _options_of_attention(attention: Any) -> dict[str, Any]:
    lsh = attention.lsh_attn
    if not lsh._rehash_each_round:
        raise InputError("rehash_each_round=False was set by hand: it has no counterpart here")
    if lsh.dropout_for_hash.p:
        raise InputError("drop_for_hash_rate was set by hand: it has no counterpart here; set it to 0")
    return {
        "heads": attention.heads,
        "dim_head": attention.dim_head,
        "attn_chunks": attention.attn_chunks,
        "one_value_head": attention.v_head_repeats > 1,
        "num_mem_kv": attention.num_mem_kv,
        "use_full_attn": attention.use_full_attn,
        "full_attn_thres": attention.full_attn_thres,
        "n_local_attn_heads": attention.n_local_attn_heads,
        "bucket_size": attention.bucket_size,
        "n_hashes": lsh.n_hashes,
        "causal": lsh.causal,
        "lsh_dropout": lsh.dropout.p,
        "lsh_attend_across_buckets": lsh._attend_across_buckets,
        "lsh_allow_duplicate_attention": lsh._allow_duplicate_attention,
        "random_rotations_per_head": lsh._random_rotations_per_head,
    }
