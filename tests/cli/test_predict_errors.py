"""predict.py and bad input: one line on stderr, exit status 2, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from reformer_lm.prediction import command, main
from reformer_lm.text import load_tokenizer

# The longest text that the model of the fixture reads, in tokens.
MAXIMUM = 64


def one_error(result: SimpleNamespace) -> str:
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


# --- mistakes on the command line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "山", "--lenght", "5"], "unknown option --lenght; did you mean --length?"),
        (["--text", "山", "--top-k", "5"], "unknown option --top-k; did you mean --top_k?"),
        (["--text", "山", "--temp", "1"], "unknown option --temp; did you mean --temperature?"),
        (["--text", "山", "--qqqqqqqqq"], "unknown option --qqqqqqqqq"),
        (["--text", "山", "水"], "unexpected argument '水'"),
        (["--text"], "--text"),
        (["--text", "山", "--temperature", "0"], "--temperature"),
        (["--text", "山", "--temperature", "-1"], "--temperature"),
        (["--text", "山", "--temperature", "nan"], "--temperature"),
        (["--text", "山", "--temperature", "hot"], "--temperature"),
        (["--text", "山", "--top_p", "0"], "--top_p"),
        (["--text", "山", "--top_p", "1.01"], "--top_p"),
        (["--text", "山", "--top_k", "-1"], "--top_k"),
        (["--text", "山", "--top_k", "2.5"], "--top_k"),
        (["--text", "山", "--repetition_penalty", "0"], "--repetition_penalty"),
        (["--text", "山", "--length", "0"], "--length"),
        (["--text", "山", "--nsamples", "0"], "--nsamples"),
        (["--text", "山", "--batch_size", "0"], "--batch_size"),
        (["--text", "山", "--seed", "-1"], "--seed"),
        (["--text", "山", "--seed", str(2**64)], "--seed"),
        ([], "no text"),
        (["--ppl"], "no text"),
        (["--text", ""], "the text is empty"),
        (["--text", " \n"], "the text is empty"),
        (["--ppl", "--unconditional"], "--unconditional"),
        (["--text", "山", "--unconditional"], "exclude each other"),
        (["--interactive", "--file", "x.txt"], "exclude each other"),
        (["--text", "山\udcff"], "--text number 1 is not valid UTF-8"),
        (["--ppl", "--compare", "山", "\udcff"], "--compare number 2 is not valid UTF-8"),
        (["--ppl", "--compare", "山"], "--compare"),
        (["--compare", "山", "水"], "--compare belongs to scoring; give --ppl, too"),
        (["--text", "山", "--explain"], "--explain belongs to scoring"),
        (["--ppl", "--compare", "山", "水", "--text", "山"], "exclude each other"),
        (["--ppl", "--compare", "山", "水", "--output", "a.csv"], "--output does not go with --compare"),
        (["--ppl", "--interactive", "--html", "a.html"], "--html does not go with --interactive"),
        (["--ppl", "--text", "山", "--output", "a.xlsx"], "unknown format '.xlsx'"),
        (["--ppl", "--text", "山", "--output", "no_such_folder/a.csv"], "no folder no_such_folder"),
        (["--ppl", "--text", "山", "--html", "no_such_folder/a.html"], "no folder no_such_folder"),
        (["--ppl", "--text", "山", "--output", "a.csv", "--explain"], "give --output a.jsonl"),
        (["--ppl", "--text", "山", "--invert"], "give --threshold X, too"),
        (["--ppl", "--text", "山", "--threshold", "0"], "--threshold"),
        (["--ppl", "--text", "山", "--sort", "upwards"], "--sort"),
        (["--ppl", "--text", "山", "--stride", "65"], "stride must be from 1 to the window's 64 tokens"),
        (["--ppl", "--text", "山", "--stride", "9", "--context", "9"], "that stride means a context of 56"),
        (["--ppl", "--text", "山", "--encoding", "big5"], "--encoding"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(predict, arguments, named):
    result = predict(*arguments)
    assert named in one_error(result)
    assert result.out == ""


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:257", "cuda:-3", "12345"])
def test_a_device_that_is_not_there(saved_model_dir, capfd, device):
    assert main(["--text", "山", "--model_dir", str(saved_model_dir), "--device", device]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --device")
    assert err.count("\n") == 1


def test_a_number_format_that_a_cpu_does_not_have(predict):
    assert one_error(predict("--text", "山", "--dtype", "float16")).startswith("error: --dtype float16 is for GPUs")


@pytest.mark.parametrize("job", [["--ppl"], []])
@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("missing.txt", None, "no such file"),
        ("missing.json", None, "no such file"),
        ("folder.txt", "folder", "folder.txt"),
        ("empty.txt", b"", "no text"),
        ("blank.txt", b"\n \n", "no text"),
        ("empty.json", b"", "empty"),
        ("none.json", b"[]", "empty"),
        ("broken.json", '["山",\n "水"'.encode(), "line 2 column"),
        ("object.json", b'{"a": 1}', "object"),
        ("number.json", '["山", 3]'.encode(), "element 2"),
        ("broken.jsonl", '{"text": "山"}\n{"text": 水}\n'.encode(), "line 2 column 10"),
        ("no_text.jsonl", b'{"sentence": "a"}\n', "line 1"),
        ("latin.txt", "山\n".encode() + b"ab\xff\n", "byte 6"),
        ("latin.json", '["山'.encode() + b'\xff"]', "byte 5"),
        ("data.csv", b"a,b\n", "no column 'text' in the first row (a, b)"),
        ("short.csv", "x,text\n1,山\n2\n".encode(), "line 3 has 1 columns and no number 2"),
        ("quote.csv", 'text\n"山"水\n'.encode(), "line 2"),
        ("empty.tsv", b"", "no text"),
        ("damaged.txt.gz", b"\x1f\x8b\x08\x00", "damaged"),
        ("data.xlsx", b"a,b\n", "unknown format"),
        ("noending", b"a\n", "unknown format"),
    ],
)
def test_bad_files(predict, tmp_path, job, name, content, named):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    error = one_error(predict(*job, "--file", str(path)))
    assert named in error
    assert name in error


def test_an_interruption_is_no_traceback(predict, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_model", interrupt)
    result = predict("--text", "山")
    assert (result.status, result.out, result.err) == (130, "", "")


def test_bad_stdin(predict):
    assert "stdin: invalid UTF-8 at byte 4" in one_error(
        predict("--ppl", "--file", "-", stdin="山\n".encode() + b"\xff")
    )
    assert "stdin: no text" in one_error(predict("--ppl", "--file", "-", stdin=b""))


@pytest.mark.parametrize("samples", ["1", "2"])
def test_length_beyond_the_model_is_refused(predict, samples):
    result = predict("--text", "山", "--length", str(MAXIMUM), "--nsamples", samples)
    # The start of the article and the prompt take a place each.
    assert f"write at most {MAXIMUM - 2}, or let the text slide on" in one_error(result)
    assert result.out == ""


def test_prompt_beyond_the_model_is_refused(predict):
    result = predict("--text", "山" * 100, "--length", "10")
    assert "101 tokens" in one_error(result)
    assert f"at most {MAXIMUM - 2} tokens of prompt" in result.err


def test_interactive_writes_one_text(predict):
    assert "--nsamples 1" in one_error(predict("--interactive", "--nsamples", "2"))


# --- a folder without a model, or with a broken one


@pytest.fixture
def copied(saved_model_dir, tmp_path):
    return Path(shutil.copytree(saved_model_dir, tmp_path / "copy"))


@pytest.mark.parametrize("job", [["--ppl", "--text", "山"], ["--text", "山"], ["--unconditional"]])
@pytest.mark.parametrize("exists", [False, True])
def test_no_model_names_the_command_that_trains_one(predict, tmp_path, job, exists):
    directory = tmp_path / "model"
    if exists:
        directory.mkdir()
    error = one_error(predict(*job, model_dir=directory))
    assert str(directory) in error
    assert "python train_reformer.py --raw --epochs 2 --model_config configs/tiny.json" in error


def test_unfinished_training_names_its_last_checkpoint(predict, copied, tmp_path):
    unfinished = tmp_path / "model"
    for step in (10, 200, 30):
        shutil.copytree(copied, unfinished / "checkpoints" / f"step-{step:08d}")
    checkpoint = unfinished / "checkpoints" / "step-00000200"
    assert f"--model_dir {checkpoint}" in one_error(predict("--text", "山", model_dir=unfinished))
    assert predict("--ppl", "--text", "山", model_dir=checkpoint).status == 0


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_larger_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["琤琮"])
    tokenizer.save_pretrained(directory)


BREAKAGES = {
    "config.json missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config.json no JSON": (lambda d: (d / "config.json").write_text('{"a": 1,\n}'), "line 2 column 1"),
    "config.json empty": (lambda d: (d / "config.json").write_text(""), "line 1 column 1"),
    "config.json a list": (lambda d: (d / "config.json").write_text("[]"), "no model's configuration"),
    "config.json no UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"\xff": 1}'), "byte 2"),
    "unknown model type": (lambda d: edit_config(d, model_type="no_such_model"), "no_such_model"),
    "impossible value": (lambda d: edit_config(d, bucket_size=-3), "bucket_size"),
    "wrong type": (lambda d: edit_config(d, hidden_size="wide"), "hidden_size"),
    "another width": (lambda d: edit_config(d, hidden_size=32), "another shape"),
    "another vocabulary": (lambda d: edit_config(d, vocab_size=100), "another shape"),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=3), "missing from the weights"),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=1), "unknown to the model"),
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "weights truncated": (lambda d: truncate(d / "model.safetensors"), "cannot be loaded"),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "weights no safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"hello" * 99),
        "cannot be loaded",
    ),
    "tokenizer missing": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer truncated": (lambda d: truncate(d / "tokenizer.json"), "tokenizer.json"),
    "tokenizer of another model": (
        save_larger_tokenizer,
        "vocab_size",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_model_folders(predict, copied, breakage):
    damage, named = BREAKAGES[breakage]
    damage(copied)
    result = predict("--ppl", "--text", "山", model_dir=copied)
    error = one_error(result)
    assert named in error
    assert str(copied) in error
    assert len(error) < 500
    assert result.out == ""


def test_a_file_is_no_model_folder(predict, saved_model_dir):
    assert "this is a file" in one_error(predict("--text", "山", model_dir=saved_model_dir / "config.json"))
