"""reformer-pytorch's models to ours and back; tests/parity has the equality of every option's gradients."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reformer_lm.convert
from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.convert import from_reformer_pytorch, to_reformer_pytorch
from reformer_lm.convert.reformer_pytorch_options import complete_options, config_of_options
from reformer_lm.convert.reformer_pytorch_reading import options_of_module
from reformer_lm.convert.verification import compare_with_reformer_pytorch, lengths_for_reformer_pytorch
from reformer_lm.errors import InputError

OPTIONS: dict[str, Any] = {
    "num_tokens": 19, "dim": 10, "depth": 3, "max_seq_len": 48, "heads": 3, "dim_head": 4, "bucket_size": 4,
    "n_hashes": 3, "ff_chunks": 5, "causal": True,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "axial": {"axial_position_emb": True, "axial_position_shape": (8, 7), "emb_dim": 6},
    "absolute": {"absolute_position_emb": True, "use_scale_norm": True},
    "fixed": {"fixed_position_emb": True, "use_rezero": True, "emb_dim": 14},
    "gated": {"ff_glu": True, "ff_mult": 3, "ff_activation": nn.SiLU, "ff_dropout": 0.1, "lsh_dropout": 0.2},
    "local heads": {"n_local_attn_heads": 2, "num_mem_kv": 8, "layer_dropout": 0.1},
    "full attention": {"use_full_attn": True, "ff_activation": nn.ReLU, "attn_chunks": 2},
    "thresholds": {"full_attn_thres": 17, "reverse_thres": 24, "n_hashes": 1},
    "shared": {"weight_tie": True, "one_value_head": True, "num_mem_kv": 4},
    "tied": {"weight_tie_embedding": True, "emb_dim": 6, "axial_position_emb": True},
    "product-key memory": {"pkm_layers": (1, 3), "pkm_num_keys": 33},
    "product-key memory everywhere": {"pkm_layers": (1, 2, 3), "pkm_num_keys": 32, "use_scale_norm": True},
    "own rotations": {"random_rotations_per_head": True},
}
# Options of reformer-pytorch without which nothing can be known; the shapes tell the rest.
NEEDED = (
    "max_seq_len", "heads", "bucket_size", "n_hashes", "causal", "use_full_attn", "full_attn_thres", "ff_activation",
    "n_local_attn_heads", "weight_tie", "random_rotations_per_head",
)  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_live_model_tells_its_options(make_peer: Any, options: dict[str, Any]) -> None:
    peer = make_peer(**options)
    ours = from_reformer_pytorch(peer)
    read = options_of_module(peer)
    given = OPTIONS | {"ff_activation": nn.GELU} | options
    if options.get("pkm_layers") == (1, 2, 3):
        # There is no feed-forward block that could tell.
        given = {name: value for name, value in given.items() if not name.startswith("ff_")}
    assert {name: read[name] for name in given} == given
    assert not ours.training
    agreement = compare_with_reformer_pytorch(ours, peer.state_dict(), read)
    # Their frequencies of positions are rounded to float32.
    assert agreement.largest_difference < 1e-5 < agreement.largest_logit
    assert ours.dtype == torch.float32
    hashed = [tokens for tokens in agreement.tokens if tokens > 17]
    assert hashed or options.get("use_full_attn")


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_state_dict_needs_only_what_shapes_do_not_say(make_peer: Any, options: dict[str, Any]) -> None:
    peer = make_peer(**options)
    known = {name: value for name, value in (OPTIONS | options).items() if name in NEEDED}
    ours = from_reformer_pytorch(peer.state_dict(), known)
    expected = from_reformer_pytorch(peer)
    for (name, one), (other_name, other) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other)
    left_open = {"ff_chunk_size", "attn_chunks", "reversible_threshold", "transformers_version"}
    left_open |= {"attention_dropout", "activation_dropout", "layer_dropout"}
    one, other = (
        {name: value for name, value in model.config.to_dict().items() if name not in left_open}
        for model in (ours, expected)
    )
    assert one == other


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back(make_peer: Any, package: Any, options: dict[str, Any]) -> None:
    peer = make_peer(**options)
    state, found = to_reformer_pytorch(from_reformer_pytorch(peer))
    found = json.loads(json.dumps(found))
    again = package.ReformerLM(
        **found
        | {
            "ff_activation": getattr(nn, found.get("ff_activation", "GELU")),
            "pkm_layers": tuple(found["pkm_layers"]),
            "axial_position_shape": tuple(found.get("axial_position_shape") or ()) or None,
        }
    )
    again.load_state_dict(state)
    expected = peer.state_dict()
    assert again.state_dict().keys() == expected.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6 if "inv_freq" in name else 0, atol=0)
    read, before = options_of_module(again), options_of_module(peer)
    del read["random_rotations_per_head"], before["random_rotations_per_head"]
    # An equal number of pieces, at their longest sequence.
    assert math.ceil(48 / read.pop("ff_chunks", 1)) == math.ceil(48 / before.pop("ff_chunks", 1))
    assert read == before


def test_wrappers_and_their_names(make_peer: Any, package: Any) -> None:
    from reformer_pytorch.generative_tools import TrainingWrapper

    peer = make_peer()
    wrapper = TrainingWrapper(peer)
    expected = from_reformer_pytorch(peer).state_dict()
    states = [wrapper.state_dict(), nn.DataParallel(peer).state_dict()]
    states.append({f"model.{name}": tensor for name, tensor in wrapper.state_dict().items()})
    # As versions without a second name for the blocks saved it.
    states.append({f"net.{name}": x for name, x in peer.state_dict().items() if "irrev" not in name})
    assert next(iter(states[0])).startswith("net.net.")
    for ours in (from_reformer_pytorch(wrapper), *(from_reformer_pytorch(state, OPTIONS) for state in states)):
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_heads_that_nobody_told(make_peer: Any) -> None:
    known = {name: value for name, value in OPTIONS.items() if name not in ("heads", "dim_head")}
    notes: list[str] = []
    ours = from_reformer_pytorch(make_peer().state_dict(), known, on_note=notes.append)
    # The frequencies of rotary positions tell the width of a head.
    assert (ours.config.num_attention_heads, ours.config.head_dim, notes) == (3, 4, [])
    state = make_peer(heads=8, absolute_position_emb=True).state_dict()
    ours = from_reformer_pytorch(state, known, on_note=notes.append)
    assert (ours.config.num_attention_heads, ours.config.head_dim) == (8, 4)
    assert "the options lack heads; taken to be 8" in notes[0]


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (128, 256, 4096)),
        ({"full_attn_thres": 1024}, (1, 1024, 1152, 1280, 4096)),
        ({"full_attn_thres": 1000, "max_seq_len": 1100}, (1, 1000, 1024)),
        ({"use_full_attn": True, "max_seq_len": 65536}, (1, 1024)),
        ({"num_mem_kv": 5}, (123, 251, 4091)),
        ({"num_mem_kv": 128, "n_local_attn_heads": 1, "full_attn_thres": 300}, (128, 256, 384, 4096)),
        ({"num_mem_kv": 5, "n_local_attn_heads": 1}, ()),
        ({"max_seq_len": 100}, ()),
    ],
    ids=str,
)
def test_lengths_of_the_comparison(options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    full = complete_options(OPTIONS | {"bucket_size": 64, "max_seq_len": 8192} | options)
    assert lengths_for_reformer_pytorch(full) == lengths


def test_half_precision_stays(make_peer: Any) -> None:
    state = make_peer(axial_position_emb=True).bfloat16().state_dict()
    ours = from_reformer_pytorch(state, OPTIONS)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


def test_the_comparison_finds_wrong_options(make_peer: Any) -> None:
    peer = make_peer()
    ours = from_reformer_pytorch(peer.state_dict(), OPTIONS | {"bucket_size": 6})
    ours.config.bucket_size = 4
    assert compare_with_reformer_pytorch(ours, peer.state_dict(), OPTIONS).largest_difference < 1e-5
    ours.config.bucket_size = 6
    assert compare_with_reformer_pytorch(ours, peer.state_dict(), OPTIONS).largest_difference > 1e-3


def test_the_causal_mask_keeps_the_weights_and_does_not_see_the_future(make_peer: Any) -> None:
    peer = make_peer(num_mem_kv=4, n_local_attn_heads=1, full_attn_thres=8, weight_tie=True, one_value_head=True)
    ours = from_reformer_pytorch(peer, causal=True).double()
    chunked = from_reformer_pytorch(peer).double()
    assert ours.config.lsh_mask == "causal"
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), chunked.parameters(), strict=True))
    x = torch.randint(0, 19, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = ours(x).logits
        for tokens in (1, 7, 30):
            torch.testing.assert_close(ours(x[:, :tokens]).logits, whole[:, :tokens], rtol=1e-9, atol=1e-9)
        start = ours(x[:, :20], use_cache=True)
        for position in range(20, 48):
            step = ours(x[:, position : position + 1], past_key_values=start.past_key_values)
            torch.testing.assert_close(step.logits[:, 0], whole[:, position], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"causal": False}, "causal is false"),
        ({"return_embeddings": True}, "return_embeddings"),
        ({"n_hash": 2}, "did you mean 'n_hashes'"),
        ({"max_seq_len": None}, "lack 'max_seq_len'"),
        ({"ff_activation": "Tanh"}, "ff_activation=Tanh"),
        ({"num_tokens": 20}, "num_tokens=20, but the weights 19"),
        ({"heads": 4}, "heads=4 with dim_head=4 makes 16"),
        ({"dim_head": 6}, "dim_head=6, but the weights 4"),
        ({"num_mem_kv": 3}, "num_mem_kv=3"),
        ({"ff_mult": 2}, "ff_mult=2"),
        ({"axial_position_emb": True}, "axial_position_emb=True"),
        ({"weight_tie": True}, "is not equal to"),
        ({"bucket_size": 0}, "bucket_size is 0; it must be a whole number of at least 1"),
        ({"heads": "3"}, "heads is '3'; it must be a whole number"),
        ({"heads": 0}, "heads is 0"),
        ({"ff_chunks": 0}, "ff_chunks is 0"),
        ({"full_attn_thres": -1}, "full_attn_thres is -1"),
        ({"causal": 1}, "causal is 1; it must be true or false"),
        ({"axial_position_shape": 8}, "axial_position_shape is 8; it must be a list"),
        ({"pkm_layers": "all"}, "pkm_layers is 'all'"),
        ({"lsh_dropout": 2}, "no model here: attention_dropout=2"),
        ({"ff_activation": 3}, "ff_activation=3"),
    ],
    ids=str,
)
def test_options_that_are_refused(make_peer: Any, options: dict[str, Any], words: str) -> None:
    state = make_peer().state_dict()
    with pytest.raises(InputError, match="^[^\n]+$") as caught:
        from_reformer_pytorch(state, OPTIONS | options)
    assert words in str(caught.value)


def test_product_key_memory_in_layers_that_share_weights(make_peer: Any) -> None:
    with pytest.raises(InputError, match="pkm_layers together with weight_tie"):
        from_reformer_pytorch(make_peer(pkm_layers=(2,), pkm_num_keys=32, weight_tie=True))


def test_activations_that_are_not_built_gated() -> None:
    with pytest.raises(InputError, match="ff_activation=GELU_ with ff_glu=True has no counterpart"):
        config_of_options(OPTIONS | {"ff_activation": "GELU_", "ff_glu": True})


def test_every_tensor_is_accounted_for(make_peer: Any) -> None:
    state = make_peer().state_dict()
    layer = "reformer.layers.blocks.1.f.net.fn."
    del state[layer + "to_out.bias"], state["reformer.layers.irrev_blocks.1.f.fn.to_out.bias"]
    del state["reformer.layers.irrev_blocks.2.f.fn.tov.weight"]
    state["reformer.layers.blocks.2.f.net.fn.tov.weight"] = torch.zeros(12, 9)
    state["reformer.layers.blocks.1.f.net.fn.to_q.weight"] = torch.zeros(3)
    state["extra"] = torch.zeros(3)
    with pytest.raises(InputError) as caught:
        from_reformer_pytorch(state, OPTIONS)
    text = str(caught.value)
    assert "missing (by their names here): reformer.stack.layers.1.attention.output.bias;" in text
    assert f"unknown: {layer}to_q.weight, extra;" in text
    assert "reformer.layers.blocks.2.f.net.fn.tov.weight [12, 9] instead of [12, 10]" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state["reformer.layers.irrev_blocks.0.f.norm.weight"].add_(1), "is not equal to"),
        (lambda state: state["layer_pos_emb.inv_freq"].add_(1), "other frequencies"),
        (lambda state: state.update({"other.token_emb.weight": torch.zeros(2, 2)}), "several models"),
        (lambda state: state.pop("token_emb.weight"), "no state dict of a ReformerLM"),
        (lambda state: state.pop("norm.weight"), "lacks norm.weight"),
    ],
)
def test_state_dicts_that_are_refused(make_peer: Any, change: Any, words: str) -> None:
    state = {name: tensor.clone() for name, tensor in make_peer().state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=words):
        from_reformer_pytorch(state, OPTIONS)


def test_modules_that_are_refused(make_peer: Any) -> None:
    peer = make_peer()
    with pytest.raises(InputError, match="leave options out"):
        from_reformer_pytorch(peer, OPTIONS)
    with pytest.raises(InputError, match="a Linear is no ReformerLM"):
        from_reformer_pytorch(nn.Linear(2, 2))
    peer.reformer.layers.blocks[1].f.net.fn.lsh_attn.n_hashes = 7
    with pytest.raises(InputError, match="differ"):
        from_reformer_pytorch(peer)
    with pytest.raises(InputError, match="causal is false"):
        from_reformer_pytorch(make_peer(causal=False))


SMALL: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "bucket_size": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
THEIRS: dict[str, Any] = SMALL | {"lsh_mask": "chunked", "key_norm": "unit", "num_local_heads": 0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (SMALL, ["lsh_mask", "key_norm", "local_keys", "local_rotary", "num_shifted_heads", "num_buckets", "causal"]),
        (THEIRS | {"num_local_heads": 1}, ["local_keys", "local_rotary"]),
        (THEIRS | {"num_local_heads": 2, "local_keys": "shared", "local_rotary": False}, ["num_local_heads"]),
        (THEIRS | {"num_local_heads": [0, 1], "local_keys": "shared", "local_rotary": False}, ["num_local_heads"]),
        (
            THEIRS | {"num_local_heads": 1, "local_keys": "shared", "local_rotary": False, "local_window": 4},
            ["local_window"],
        ),
        (THEIRS | {"num_shifted_heads": 1}, ["num_shifted_heads"]),
        (THEIRS | {"num_buckets": 8}, ["num_buckets"]),
        (THEIRS | {"position_type": "none"}, ["position_type"]),
        (THEIRS | {"axial_dims": [3, 5]}, ["axial_dims"]),
        (THEIRS | {"intermediate_size": 12}, ["intermediate_size"]),
        (THEIRS | {"layer_norm_eps": 1e-6}, ["layer_norm_eps"]),
        (THEIRS | {"hidden_dropout_prob": 0.1}, ["hidden_dropout_prob"]),
        (THEIRS | {"merge_streams": "concatenate"}, ["merge_streams"]),
        (THEIRS | {"attention_output_bias": False}, ["attention_output_bias"]),
        (THEIRS | {"unit_output_vectors": True, "lm_head_bias": True}, ["lm_head_bias"]),
    ],
    ids=str,
)
def test_models_without_counterpart_there(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError, match="^[^\n]+$") as caught:
        to_reformer_pytorch(ReformerLMForCausalLM(ReformerLMConfig(**fields)))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": False}, {"position_type": "rotary", "reversible": "off"}, {"embedding_size": 6}],
    ids=str,
)
def test_our_output_layer_fits_into_theirs(package: Any, fields: dict[str, Any]) -> None:
    ours = ReformerLMForCausalLM(ReformerLMConfig(**THEIRS | fields)).eval()
    state, options = to_reformer_pytorch(ours)
    agreement = compare_with_reformer_pytorch(ours, state, options)
    assert agreement.largest_difference < 1e-9 < agreement.largest_logit


def test_the_package_is_not_needed_to_read_its_weights() -> None:
    files = sorted(Path(reformer_lm.convert.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for path in files:
        # Inside of functions, for the comparison, it may be imported.
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "reformer_pytorch"], path
