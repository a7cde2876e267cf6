"""train_reformer.py as a user meets it. Most calls are in this process, because importing torch takes seconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reformer_lm.corpus import read_index
from reformer_lm.training import main

ROOT = Path(__file__).parents[2]
CHARACTERS = "春夏秋冬天地山水风花雪月人有大小上下一二三四五六七八九十，。！？的了是不在我你他"
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "bucket_size": 4,
    "num_hashes": 2,
}
Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a clone of the project, but tiny."""
    articles = ["".join(CHARACTERS[(start + 3 * i) % len(CHARACTERS)] for i in range(30)) for start in range(14)]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]), encoding="utf-8"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(articles[:12]), encoding="utf-8")
    (tmp_path / "data" / "val.json").write_text(json.dumps(articles[12:]), encoding="utf-8")
    (tmp_path / "configs").mkdir()
    training = {"tokenizer_path": "vocab.txt", "batch_size": 4, "lr": 0.01, "device": "cpu", "max_steps": 2}
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps({"model": MODEL, "training": training}))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call main and give its status and lines."""

    def call(*argv: str) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        status = main(list(argv))
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def assert_refused(result: tuple[int, list[str], list[str]], *fragments: str) -> None:
    status, _, errors = result
    assert status == 2
    assert errors[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in errors) == 1
    assert all(fragment in errors[-1] for fragment in fragments), errors[-1]


def test_a_run_from_text_to_model(run: Run) -> None:
    status, lines, errors = run("--raw", "--epochs", "4", "--max_steps", "24", "--eval_every", "10", "--lr", "0.03")
    assert status == 0
    assert errors == []
    # 12 articles of 30 characters, each with its beginning and end.
    assert "corpus: 12 articles, 384 tokens, 0.00% [UNK]" in lines
    assert "validation: 2 articles, 64 tokens, 0.00% [UNK]" in lines
    assert "windows: 24 per epoch, 16 tokens each, one every 16 tokens" in lines
    assert "steps: 24 in all, 6 per epoch, 64 tokens per step (4 x 1 windows)" in lines
    validations = [line for line in lines if "validation loss" in line]
    assert [line.split("  ")[0] for line in validations] == ["step 0", "step 10", "step 20", "step 24"]
    assert validations[0].endswith("(63 tokens)")
    assert all(line.endswith("(63 tokens)  best so far") for line in validations[1:])
    first, last = (float(validations[i].split("PPL ")[1].split()[0]) for i in (0, -1))
    assert last < first / 2
    assert f"validation PPL {first} at first, {last} now" in lines

    names = {path.name for path in Path("model").iterdir()}
    assert names == {
        "best",
        "checkpoints",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "run.json",
        "run_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_state.pt",
    }
    tokenizer, model = AutoTokenizer.from_pretrained("model"), AutoModelForCausalLM.from_pretrained("model")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[MASK]", "[CLS]")
    assert model.config.vocab_size == len(tokenizer)
    assert list(Path("tensorboard_summary").iterdir())


def test_token_count_is_right_for_min_length_and_unknown_characters(run: Run) -> None:
    articles = ["天地" * 10, "龘天龘地靐" * 5, "短", "上\n下" * 8]
    Path("data/train.json").write_text(json.dumps(articles), encoding="utf-8")
    status, lines, errors = run("--raw", "--min_length", "19")
    assert status == 0
    assert "corpus: 3 articles, 75 tokens, 20.00% [UNK]; 1 of 19 characters or fewer left out" in lines
    (note,) = [line for line in errors if "[UNK]" in line]
    assert "龘 x 10, 靐 x 5" in note


def test_shards_are_reused_only_where_they_match(run: Run) -> None:
    assert_refused(run(), "no token shards here", "--raw")
    assert run("--raw")[0] == 0
    written = Path("data/tokenized/train/index.json").stat().st_mtime_ns
    for argv in (["--raw"], [], ["--raw", "--lr", "0.02"]):
        status, lines, _ = run(*argv)
        assert status == 0
        assert "corpus: 12 articles, 384 tokens, 0.00% [UNK]" in lines
        assert sum("reusing" in line for line in lines) == 2
        assert Path("data/tokenized/train/index.json").stat().st_mtime_ns == written

    # A copy with another time is the same corpus.
    os.utime("data/train.json", (1, 1))
    assert run()[0] == 0
    assert_refused(run("--min_length", "5"), "--min_length 0, not 5", "--raw")
    assert_refused(run("--raw_data_path", "data/val.json"), "not of data/val.json", "--raw")
    Path("data/train.json").write_text(json.dumps(["天地" * 50]), encoding="utf-8")
    assert_refused(run(), "not of data/train.json as it is now", "--raw")
    Path("data/train.json").unlink()
    assert run()[0] == 0

    content = bytearray(Path("data/tokenized/train/tokens-00000.bin").read_bytes())
    Path("data/tokenized/train/tokens-00000.bin").write_bytes(content[:-2])
    assert_refused(run(), "tokens-00000.bin", "truncated", "--raw")
    other = Path("vocab.txt").read_text(encoding="utf-8").splitlines()
    Path("vocab.txt").write_text("\n".join([*other[:-2], other[-1], other[-2]]), encoding="utf-8")
    assert_refused(run(), "another tokenizer", "--raw")


@pytest.mark.parametrize(("settings", "shards"), [([], 8), (["--num_pieces", "3"], 3), (["--num_pieces", "99"], 12)])
def test_raw_writes_the_pieces_asked_for(run: Run, settings: list[str], shards: int) -> None:
    assert run("--raw", "--num_pieces", "2")[0] == 0
    assert run("--raw", *settings)[0] == 0
    assert len(read_index("data/tokenized/train").shards) == shards
    assert len(list(Path("data/tokenized/train").glob("tokens-*.bin"))) == shards


def test_without_validation_text_a_note_is_given(run: Run) -> None:
    Path("data/val.json").unlink()
    status, lines, errors = run("--raw")
    assert status == 0
    assert any("--val_data_path" in line for line in errors)
    assert not any("validation" in line for line in lines)


def test_quiet_prints_validation_and_result_only(run: Run) -> None:
    status, lines, _ = run("--raw", "--quiet", "--log_step", "1", "--sample_every", "1")
    assert status == 0
    assert len(lines) == 4
    assert all("validation" in line for line in lines[:3])
    assert lines[3].startswith("model saved in model/")


def test_sample_and_log_lines(run: Run) -> None:
    status, lines, _ = run("--raw", "--log_step", "1", "--sample_every", "2", "--eval_every", "0")
    assert status == 0
    assert sum(line.startswith(("step 1/2  loss ", "step 2/2  loss ")) for line in lines) == 2
    assert sum(line.startswith("step 2  sample: ") for line in lines) == 1
    assert sum("validation loss" in line for line in lines) == 2


def test_bfloat16_trains(run: Run) -> None:
    status, lines, _ = run("--raw", "--bf16", "--epochs", "4", "--max_steps", "24", "--lr", "0.03")
    assert status == 0
    assert any("bfloat16 mixed" in line for line in lines)
    first, last = lines[-2].removeprefix("validation PPL ").removesuffix(" now").split(" at first, ")
    assert float(last) < float(first) / 2
    assert {tensor.dtype for tensor in load_file("model/model.safetensors").values()} == {torch.float32}


def test_pretrained_weights_are_the_start(run: Run) -> None:
    assert run("--raw", "--output_dir", "first")[0] == 0
    # The folder's own tokenizer and shape, whatever the default configuration says of the latter.
    config = json.loads(Path("configs/tiny.json").read_text())
    del config["training"]["tokenizer_path"]
    config["model"]["hidden_size"] = 32
    Path("configs/tiny.json").write_text(json.dumps(config))
    status, lines, _ = run("--pretrained_model", "first", "--lr", "1e-12", "--output_dir", "second")
    assert status == 0
    assert any("hidden size 16" in line for line in lines)
    ours, theirs = load_file("first/model.safetensors"), load_file("second/model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)
    given = ["--pretrained_model", "first", "--model_config", "configs/tiny.json"]
    assert_refused(run(*given), "a checkpoint of another shape", "hidden_size 16 there, 32 here")
    assert_refused(run("--pretrained_model", "nowhere"), "no model in nowhere")
    assert_refused(run("--pretrained_model", "data"), "no model in data")


def test_a_new_run_in_the_same_folder_says_so(run: Run) -> None:
    assert run("--raw", "--max_steps", "3")[0] == 0
    status, _, errors = run("--seed", "5")
    assert status == 0
    assert any("holds an earlier run" in line and "--resume" in line for line in errors)
    assert [path.name for path in Path("model/checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["no such file"]),
        (b'["a",\n "b" 3]', ["invalid JSON at line 2 column 6"]),
        (b'["a", 3]', ["element 2 is a number"]),
        (b'{"a": "b"}', ["the JSON is an object", "list of strings"]),
        (b"[]", ["the corpus is empty"]),
        (b'["ab\xe6"]', ["invalid UTF-8 at byte 4"]),
    ],
)
@pytest.mark.parametrize("flag", ["--raw_data_path", "--val_data_path"])
def test_bad_corpora(run: Run, flag: str, content: bytes | None, fragments: list[str]) -> None:
    if content is not None:
        Path("bad.json").write_bytes(content)
    assert_refused(run("--raw", flag, "bad.json"), "bad.json", *fragments)
    assert not Path("model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--stride", "0"], ["--stride is 0", "at least 1"]),
        (["--batch_size", "0"], ["--batch_size is 0", "at least 1"]),
        (["--lr", "-1"], ["--lr is -1", "greater than 0"]),
        (["--epoch", "1"], ["--epoch", "--epochs"]),
        (["--max_seq_len", "17"], ["--max_seq_len is 17", "16"]),
        (["--fp16"], ["--fp16 needs a CUDA device", "--bf16"]),
        (["--device", "abacus"], ["--device is 'abacus'"]),
        (["--model_config", "missing.json"], ["missing.json"]),
        (["--tokenizer_path", "missing.txt"], ["missing.txt"]),
        (["--segment", "--tokenizer_path", "vocab.txt"], ["words"]),
        (["--bpe_token"], ["--bpe_token", "byte-pair"]),
        (["--min_length", "5000"], ["--min_length"]),
        (["--resume"], ["no checkpoint in model/"]),
        (["--report_to", "tensorbord"], ["--report_to is tensorbord", "tensorboard", "none"]),
        (["--output_dir", "vocab.txt"], ["vocab.txt: this is a file", "--output_dir"]),
        (["--output_dir", "vocab.txt/model"], ["vocab.txt/model", "cannot be written"]),
        (["--output_dir", "/proc/model"], ["/proc/model", "cannot be written"]),
        (["--writer_dir", "/proc/writer"], ["/proc/writer", "--writer_dir"]),
        (["--tokenized_data_path", "/proc/tokens"], ["/proc/tokens", "--tokenized_data_path"]),
    ],
)
def test_bad_arguments(run: Run, argv: list[str], fragments: list[str]) -> None:
    assert_refused(run("--raw", *argv), *fragments)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ('{"model": {"hiden_size": 4}}', ["unknown model key 'hiden_size'", "'hidden_size'"]),
        ('{"hidden_size": 4, "n_layer": 3}', ["unknown model key 'n_layer'", "'num_hidden_layers'"]),
        ('{"training": {"batchsize": 4}}', ["unknown training key 'batchsize'", "'batch_size'"]),
        ('{"model": {"hidden_size": 7, "num_attention_heads": 2}}', ["hidden_size", "7"]),
        ('{"model": {"hidden_size": 8,\n}}', ["invalid JSON at line 2 column 1"]),
        ('{"model": {"vocab_size": 3}}', ["vocab_size is 3"]),
    ],
)
def test_bad_configurations(run: Run, config: str, fragments: list[str]) -> None:
    Path("bad.json").write_text(config)
    assert_refused(run("--raw", "--model_config", "bad.json", "--tokenizer_path", "vocab.txt"), "bad.json", *fragments)


def test_model_without_a_config_file_has_the_built_in_settings(run: Run) -> None:
    Path("configs/tiny.json").unlink()
    # Refused late enough to show that the built-in configuration was taken: its windows hold 4,096 tokens.
    result = run("--raw", "--tokenizer_path", "vocab.txt", "--max_seq_len", "4097")
    assert_refused(result, "max_position_embeddings is 4096")


def test_the_script_itself() -> None:
    """The real program: exit status, one line on stderr, Ctrl-C."""
    script = [sys.executable, str(ROOT / "train_reformer.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run([*script, "--strid", "4"], capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == "error: unknown option --strid; did you mean --stride?\n"

    argv = [*script, "--raw", "--epochs", "1000", "--max_steps", "100000", "--log_step", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "continue with: python train_reformer.py --epochs 1000 " in rest.splitlines()[-1]
    assert Path("model/training_state.pt").is_file()
