"""Files from strangers: only tensors come out of them, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reformer_lm.convert.command import main
from reformer_lm.convert.safe_loading import read_json, read_tensors
from reformer_lm.errors import InputError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.float16)}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def files_that_would_run_code(folder: Path, harm: Path) -> list[Path]:
    paths = [folder / name for name in ("zip.pt", "old.pt", "bare.pkl", "beside.bin", "new.pkl")]
    torch.save(Malicious(harm), paths[0])
    torch.save({"a": Malicious(harm)}, paths[1], _use_new_zipfile_serialization=False)
    paths[2].write_bytes(pickle.dumps(Malicious(harm), protocol=2))
    paths[4].write_bytes(pickle.dumps(Malicious(harm), protocol=5))
    torch.save({"state_dict": STATE, "hyper_parameters": Malicious(harm)}, paths[3])
    return paths


# torch warns of the protocol of bare pickles before it refuses them.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_refused_and_does_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    harm = tmp_path / "harm"
    options = tmp_path / "options.json"
    options.write_text("{}")
    paths = files_that_would_run_code(tmp_path, harm)
    for path in paths:
        with pytest.raises(InputError, match=r"^[^\n]*could run code, so it is refused[^\n]*$") as caught:
            read_tensors(path)
        assert ("mkdir" if path.name != "new.pkl" else "pickle instructions") in str(caught.value)
        assert main([str(path), "--config", str(options), "--output", str(tmp_path / "out")]) == 2
        assert "could run code" in capfd.readouterr().err
    assert not harm.exists()
    assert not (tmp_path / "out").exists()
    # It would have.
    pickle.loads(paths[2].read_bytes())
    assert harm.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"asks for torch.nn.modules.linear.Linear.*save model.state_dict\(\) alone"):
        read_tensors(tmp_path / "model.pt")


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_torch(tmp_path: Path, key: str | None, new_format: bool) -> None:
    path = tmp_path / "weights.bin"
    content = STATE if key is None else {key: STATE, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert same(read_tensors(path))


def test_safetensors_in_one_file_and_in_several(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "whole.safetensors")
    assert same(read_tensors(tmp_path / "whole.safetensors"))
    save_file({"a": STATE["a"]}, tmp_path / "1.safetensors")
    torch.save({"b": STATE["b"]}, tmp_path / "2.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.bin"}}))
    assert same(read_tensors(index))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "1.safetensors", "c": "1.safetensors"}}, "c and 0 more are in none"),
        ({"weight_map": {"a": "../1.safetensors"}}, "outside of its folder"),
        ({"weight_map": ["a"]}, "names no files"),
        ({"weight_map": {"a": "lost.safetensors"}}, "no such file"),
    ],
    ids=str,
)
def test_wrong_indices(tmp_path: Path, index: Any, words: str) -> None:
    save_file({"a": STATE["a"]}, tmp_path / "1.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=words):
        read_tensors(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"", "no readable file of torch.save"),
        ("a.pt", b"tokens 1 2 3", "no readable file of torch.save"),
        ("a.pt", b"PK\x03\x04broken", "no readable file of torch.save"),
        ("a.safetensors", b"broken", "no readable safetensors file"),
    ],
    ids=str,
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^[^\n]*{words}[^\n]*$"):
        read_tensors(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "but a list"), ({"a": 3}, "'a' is no tensor"), ({}, "it is empty"), (torch.ones(2), "but a Tensor")],
    ids=str,
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=words):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "invalid JSON at line 1"), (b"\xff", "invalid UTF-8"), (b"[]", "no JSON object")],
    ids=str,
)
def test_broken_json(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
