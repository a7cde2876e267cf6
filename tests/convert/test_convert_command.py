"""python -m reformer_lm.convert: folders and files of every format, and predict.py on what comes out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, ReformerConfig, ReformerModelWithLMHead

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.convert import from_reformer_pytorch, from_transformers
from reformer_lm.convert.command import main
from reformer_lm.errors import InputError
from reformer_lm.prediction import main as predict
from reformer_lm.text import load_tokenizer
from reformer_lm.text.conventions import DEFAULT_VOCABULARY

OPTIONS: dict[str, Any] = {
    "num_tokens": 19, "dim": 10, "depth": 3, "max_seq_len": 48, "heads": 3, "dim_head": 4, "bucket_size": 4,
    "n_hashes": 3, "ff_chunks": 5, "causal": True,
}  # fmt: skip


@pytest.fixture
def convert(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process."""

    def run(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def write_options(folder: Path, **changes: Any) -> Path:
    path = folder / "options.json"
    path.write_text(json.dumps(OPTIONS | changes))
    return path


def same_weights(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def chinese_folder(package: Any, tmp_path: Path) -> Path:
    """What reformer-chinese's train.py leaves: a wrapper's state dict, and a config.json with its slip."""
    from reformer_pytorch.generative_tools import TrainingWrapper

    folder = tmp_path / "chinese"
    folder.mkdir()
    shutil.copy(DEFAULT_VOCABULARY, folder / "vocab.txt")
    tokens = len(load_tokenizer())
    options = {"dim": 16, "depth": 2, "max_seq_len": 256, "lsh_dropout": 0.1, "causal": True, "full_attn_thres": 64}
    torch.manual_seed(0)
    wrapper = TrainingWrapper(package.ReformerLM(num_tokens=tokens, **options), ignore_index=0, pad_value=0)
    torch.save(wrapper.state_dict(), folder / "model.pt")
    # train.py writes the stride of its windows there as dim.
    config = {"num_tokens": tokens} | options | {"dim": 512, "stride": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_reformer_chinese_scores_and_generates(
    convert: Any, chinese_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    result = convert(chinese_folder, "--output", output, "--verify")
    assert result.status == 0, result.err
    assert "note: config.json says dim 512, and the weights 16" in result.err
    assert "within the tolerance" in result.out
    assert "128, 256 tokens" in result.out
    assert "Writing" not in result.err
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    config = json.loads((output / "config.json").read_text())
    tokenizer = load_tokenizer(output)
    assert (config["head_dim"], config["num_hashes"], config["attention_dropout"]) == (64, 4, 0.1)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    for job in (["--ppl", "--text", "他把门轻轻关上。"], ["--text", "清晨的车站", "--length", "5", "--seed", "1"]):
        assert predict([*job, "--model_dir", str(output), "--device", "cpu"]) == 0, capfd.readouterr().err
    assert "清晨的车站" in capfd.readouterr().out


def test_a_folder_of_reformer_chinese_with_the_causal_mask(
    convert: Any, chinese_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    result = convert(chinese_folder, "--output", output, "--causal", "--from", "reformer-chinese")
    assert result.status == 0, result.err
    assert "compute another function than before; fine-tune them" in result.err
    config = json.loads((output / "config.json").read_text())
    assert (config["lsh_mask"], config["full_attention_threshold"]) == ("causal", 64)
    assert predict(["--ppl", "--text", "他把门轻轻关上。", "--model_dir", str(output), "--device", "cpu"]) == 0


def test_a_state_dict_with_its_options(convert: Any, make_peer: Any, tmp_path: Path) -> None:
    peer = make_peer()
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    output = tmp_path / "out"
    result = convert(tmp_path / "weights.pt", "--output", output, "--config", write_options(tmp_path), "--verify")
    assert result.status == 0, result.err
    assert "no tokenizer was written" in result.err
    assert same_weights(AutoModelForCausalLM.from_pretrained(output), from_reformer_pytorch(peer))


def test_there_and_back_on_the_command_line(convert: Any, make_peer: Any, tmp_path: Path) -> None:
    peer = make_peer(weight_tie=True, one_value_head=True, num_mem_kv=4, axial_position_emb=True)
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    options = write_options(tmp_path, weight_tie=True)
    ours, theirs, again = (tmp_path / name for name in ("ours", "theirs", "again"))
    assert convert(tmp_path / "weights.pt", "--output", ours, "--config", options).status == 0
    result = convert(ours, "--output", theirs, "--to", "reformer-pytorch", "--verify")
    assert result.status == 0, result.err
    state = torch.load(theirs / "model.pt", weights_only=True)
    assert state.keys() == peer.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in peer.state_dict().items())
    assert convert(theirs, "--output", again, "--verify").status == 0
    models = [ReformerLMForCausalLM.from_pretrained(folder) for folder in (ours, again)]
    assert same_weights(*models)
    assert models[0].config.share_layer_weights and models[1].config.share_layer_weights


def save_hf_model(folder: Path, **options: Any) -> ReformerModelWithLMHead:
    torch.manual_seed(0)
    config = ReformerConfig(
        is_decoder=True, attn_layers=["local", "lsh"], hidden_size=12, num_attention_heads=2, attention_head_size=6,
        feed_forward_size=16, axial_pos_shape=(4, 16), axial_pos_embds_dim=(4, 8), max_position_embeddings=64,
        local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=[2, 4], vocab_size=23, **options,
    )  # fmt: skip
    model = ReformerModelWithLMHead(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def test_a_folder_of_transformers(convert: Any, tmp_path: Path) -> None:
    peer = save_hf_model(tmp_path / "theirs", hash_seed=0)
    output = tmp_path / "out"
    result = convert(tmp_path / "theirs", "--output", output, "--verify")
    assert result.status == 0, result.err
    assert "has a bias: it counts here" in result.err
    assert "attention dropout is 0.0 in LSH and 0.05 in local layers" in result.err
    ours = ReformerLMForCausalLM.from_pretrained(output)
    assert same_weights(ours, from_transformers(peer))
    assert ours.config.num_buckets == [4, 2]


def test_weights_of_older_versions_of_transformers(convert: Any, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    expected = from_transformers(save_hf_model(folder))
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    for layer, kinds in enumerate((("mask",), ("mask", "self_mask"))):
        for kind in kinds:
            name = f"reformer.encoder.layers.{layer}.attention.self_attention.{kind}_value_float16"
            state[name] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    assert convert(folder, "--output", tmp_path / "out", "--verify").status == 0
    assert same_weights(ReformerLMForCausalLM.from_pretrained(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"is_decoder": False}, "is_decoder is false"),
        ({"lsh_num_chunks_before": 2}, "lsh_num_chunks_before is 2"),
        ({"local_num_chunks_before": 0}, "local_num_chunks_before is 0"),
        ({"local_num_chunks_after": 1}, "local_num_chunks_after is 1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"attn_layers": ["lsh", "full"]}, "has full besides"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_size": 13}, "no model here"),
        ({"feed_forward_size": 20}, "of another shape: reformer.encoder.layers.0.feed_forward.dense.dense.weight"),
        ({"attn_layers": ["lsh", "lsh"]}, "unknown: reformer.encoder.layers.0.attention.self_attention.key.weight"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
    ids=str,
)
def test_folders_of_transformers_that_are_refused(
    convert: Any, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    save_hf_model(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    result = convert(tmp_path / "theirs", "--output", tmp_path / "out", "--from", "transformers")
    assert result.status == 2
    assert words in result.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_unset_number_of_buckets_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    peer = save_hf_model(tmp_path / "theirs")
    peer.config.num_buckets = None
    notes: list[str] = []
    ours = from_transformers(peer, on_note=notes.append)
    peer.reformer.encoder.layers[1].attention.self_attention._set_num_buckets(64)
    assert ours.config.num_buckets == [peer.config.num_buckets] == [16]
    assert any("num_buckets is not set" in note for note in notes)


def test_a_difference_is_found_and_nothing_written(
    convert: Any, make_peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(make_peer().state_dict(), tmp_path / "weights.pt")
    arguments = (tmp_path / "weights.pt", "--output", tmp_path / "out", "--config", write_options(tmp_path), "--verify")
    result = convert(*arguments, "--tolerance", "0")
    assert result.status == 1
    assert "beyond the tolerance of 0" in result.out
    assert "nothing was written" in result.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "reformer_pytorch", None)
    monkeypatch.setitem(sys.modules, "reformer_pytorch.reformer_pytorch", None)
    result = convert(*arguments)
    assert (result.status, "pip install reformer-pytorch" in result.err) == (2, True)


def test_a_folder_that_is_not_empty_is_left_alone(convert: Any, make_peer: Any, tmp_path: Path) -> None:
    torch.save(make_peer().state_dict(), tmp_path / "weights.pt")
    output = tmp_path / "out"
    output.mkdir()
    (output / "pytorch_model.bin").write_text("an earlier model's")
    (output / "notes.txt").write_text("mine")
    arguments = (tmp_path / "weights.pt", "--output", output, "--config", write_options(tmp_path))
    result = convert(*arguments)
    assert (result.status, "is not empty" in result.err) == (2, True)
    assert len(list(output.iterdir())) == 2
    assert convert(*arguments, "--overwrite").status == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "pytorch_model.bin").exists()
    assert same_weights(ReformerLMForCausalLM.from_pretrained(output), from_reformer_pytorch(make_peer()))


def test_what_cannot_be_converted(convert: Any, make_peer: Any, chinese_folder: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "weights.pt", tmp_path / "out"
    torch.save(make_peer().state_dict(), weights)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    no_weights = tmp_path / "no_weights"
    no_weights.mkdir()
    shutil.copy(chinese_folder / "config.json", no_weights)
    options = write_options(tmp_path)
    for arguments, words in (
        ((weights, "--output", out), "--config options.json"),
        ((tmp_path / "absent", "--output", out), "no such file or folder"),
        ((empty, "--output", out), "neither config.json nor options.json"),
        ((other, "--output", out), "model_type 'gpt2'"),
        ((no_weights, "--output", out), "no weights (model.pt or model_cpu.pt)"),
        ((weights,), "--output"),
        ((weights, "--output", out, "--cofnig", options), "did you mean --config?"),
        ((weights, "--output", weights), "is a file"),
        ((chinese_folder, "--output", chinese_folder, "--overwrite"), "is SOURCE itself"),
        ((weights, "--output", out, "--config", options, "--causal", "--verify"), "give one"),
        ((weights, "--output", out, "--to", "reformer-pytorch", "--causal"), "leave out"),
        ((weights, "--output", out, "--to", "reformer-pytorch"), "no folder of a model of this package"),
        ((weights, "--output", out, "--config", options, "--tolerance", "-1"), "--tolerance is -1"),
        ((weights, "--output", out, "--config", options, "--vocab", DEFAULT_VOCABULARY), "of different models"),
        ((weights, "--output", out, "--config", options, "--vocab", tmp_path / "v.txt"), "v.txt"),
    ):
        result = convert(*arguments)
        assert result.status == 2, arguments
        assert words in result.err, (arguments, result.err)
        assert result.err.count("error: ") == 1 and "Traceback" not in result.err
    assert not out.exists()


def test_a_damaged_model_of_ours_is_not_exported(convert: Any, make_peer: Any, tmp_path: Path) -> None:
    from_reformer_pytorch(make_peer()).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    result = convert(tmp_path / "ours", "--output", tmp_path / "out", "--to", "reformer-pytorch")
    assert (result.status, "are not as config.json says" in result.err) == (2, True)
    result = convert(tmp_path / "ours", "--output", tmp_path / "out")
    assert (result.status, "is a model of this package already" in result.err) == (2, True)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    save_hf_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="there are no weights"):
        from_transformers(tmp_path)
