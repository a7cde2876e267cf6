"""What reproduces a run: its settings as a file that gives the same run, and the record of each start."""

import importlib.metadata
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reformer_lm import ReformerLMForCausalLM, record_attention
from reformer_lm.corpus import EvaluationWindows, load_shards
from reformer_lm.text import load_tokenizer, tokenizer_fingerprint
from reformer_lm.training import main, run_folder
from reformer_lm.training.arguments import COMMAND_LINE_ONLY, FIELDS, TrainingArguments, parse_arguments
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.metrics import read_metrics
from reformer_lm.training.models import build_config
from reformer_lm.training.run_folder import commit_of_the_code

ROOT = Path(__file__).parents[2]
RUN = """--raw --epochs 1 --batch_size 4 --max_seq_len 16 --stride 16 --max_steps 5 --eval_every 2 --log_step 2
    --sample_every 4""".split()


def without_the_file(arguments: TrainingArguments) -> dict[str, object]:
    return {**vars(arguments), "model_config": None}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "flags", [[], ["--bf16", "--lr", "1e-4", "--raw", "--report_to", "none"]], ids=["plain", "flags"]
)
def test_printed_settings_give_the_same_run(
    path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--model_config", str(path), "--device", "cpu", *flags]
    capsys.readouterr()
    assert main([*asked, "--print_config"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    printed = json.loads(captured.out)
    assert printed.keys() == {"model", "training"}
    Path("printed.json").write_text(captured.out, encoding="utf-8")
    # Nothing else was made.
    assert [entry.name for entry in tmp_path.iterdir()] == ["printed.json"]

    first, again = parse_arguments(asked), parse_arguments(["--model_config", "printed.json"])
    assert without_the_file(again.arguments) == without_the_file(first.arguments)
    assert again.config_file is not None and first.config_file is not None
    tokenizer = load_tokenizer()
    configs = [build_config(request.config_file.model, "", tokenizer) for request in (first, again)]
    assert configs[0].to_dict() == configs[1].to_dict()
    # Every key stands there, resolved, and printing again prints the same.
    if configs[0].model_type == "reformer_lm":
        assert printed["model"]["num_buckets"] == configs[0].num_buckets
    else:
        assert printed["model"]["model_type"] == configs[0].model_type
    never = {*COMMAND_LINE_ONLY, "raw_data_path", "min_length"}
    assert printed["training"].keys() == FIELDS.keys() - never
    assert main(["--model_config", "printed.json", "--print_config"]) == 0
    assert capsys.readouterr().out == captured.out


def test_settings_and_record_of_a_run_make_it_again(workplace: Path) -> None:
    changed = ["--lr", "0.02", "--num_pieces", "3", "--min_length", "1"]
    assert main([*RUN, *changed, "--output_dir", "one"]) == 0
    assert main(["--model_config", "one/run_config.json", "--output_dir", "two"]) == 0
    ours, theirs = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, two = (json.loads(Path(name, "run_config.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one.pop("training") | {"output_dir": "two"} == two.pop("training")
    assert one == two

    (start,) = json.loads(Path("one/run.json").read_text(encoding="utf-8"))["starts"]
    assert start["arguments"] == [*RUN, *changed, "--output_dir", "one"]
    assert start["folder"] == str(workplace)
    assert start["step"] == 0
    assert start["versions"]["torch"] == importlib.metadata.version("torch")
    assert start["hardware"]["cores"] >= 1
    assert start["data"]["tokens"] == 384
    assert start["parameters"] == sum(tensor.numel() for tensor in ours.values())
    assert start["precision"] == "float32"


def test_a_corpus_that_was_not_named_is_not_named_in_the_settings(workplace: Path) -> None:
    """Shards may be of another corpus than the default one; to name that would ask for it."""
    Path("data/train.json").rename("data/other.json")
    assert main([*RUN, "--raw_data_path", "data/other.json", "--min_length", "5"]) == 0
    unnamed = [flag for flag in RUN if flag != "--raw"]
    assert main([*unnamed, "--output_dir", "one"]) == 0
    assert main(["--model_config", "one/run_config.json", "--output_dir", "two"]) == 0
    ours, theirs = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_to_start_from_are_in_the_settings(workplace: Path) -> None:
    assert main([*RUN, "--output_dir", "first"]) == 0
    assert main([*RUN, "--pretrained_model", "first", "--output_dir", "one"]) == 0
    assert main(["--model_config", "one/run_config.json", "--output_dir", "two"]) == 0
    ours, theirs = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_metrics_are_what_the_lines_say_and_histograms_what_the_recorder_sees(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(RUN) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = read_metrics(Path("model/metrics.jsonl"))
    said = [line.split("  ") for line in lines if line.startswith("step ")]
    training = [line for line in measured if "train/loss" in line]
    assert [(words[0], words[1]) for words in said if words[1].startswith("loss")] == [
        (f"step {line['step']}/5", f"loss {line['train/loss']:.3f}") for line in training
    ]
    assert [line["step"] for line in training] == [2, 4, 5]
    validations = [line for line in measured if "validation/loss" in line]
    assert [(words[0], words[1]) for words in said if "validation" in words[1]] == [
        (f"step {line['step']}", f"validation loss {line['validation/loss']:.3f}") for line in validations
    ]
    assert [line["step"] for line in validations] == [0, 2, 4, 5]
    assert [line["step"] for line in measured if "sample" in line] == [4]
    assert training[-1]["train/tokens_seen"] == load_state(Path("model"))["progress"]["tokens_seen"]
    assert any(
        line.startswith("watch it: model/metrics.jsonl, tensorboard --logdir tensorboard_summary/; ") for line in lines
    )

    # The last validation saw the model that was saved.
    tokenizer, model = load_tokenizer("model"), ReformerLMForCausalLM.from_pretrained("model").eval()
    stream = load_shards("data/tokenized/validation", tokenizer_fingerprint(tokenizer))
    window = EvaluationWindows(stream, 16)[0].unsqueeze(0)
    with torch.inference_mode(), record_attention(model, max_weights_tokens=0) as records:
        model(window)
    events = EventAccumulator("tensorboard_summary", size_guidance={"histograms": 0})
    events.Reload()
    for record in records:
        assert record.buckets is not None
        held: Counter[int] = Counter()
        for one_round in record.buckets[0].flatten(0, 1):
            held.update(torch.bincount(one_round, minlength=model.config.num_buckets).tolist())
        name = f"buckets/layer_{record.layer_index}"
        assert validations[-1][name] == [list(pair) for pair in sorted(held.items())]
        written = events.Histograms(name)
        assert [event.step for event in written] == [0, 2, 4, 5]
        histogram = written[-1].histogram_value
        bars = zip(histogram.bucket_limit, histogram.bucket, strict=True)
        assert {int(limit - 0.5): count for limit, count in bars if count} == held


def test_metrics_of_a_stopped_and_resumed_run_have_each_step_once(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, "--log_step", "1", "--lr_schedule", "constant", "--warmup_steps", "0"]
    assert main([*run, "--output_dir", "straight"]) == 0
    assert main([*run, "--max_steps", "3", "--save_every", "2"]) == 0
    # As if it had been killed at step 3, in the middle of a line.
    folder = Path("model/checkpoints/step-00000003")
    folder.rename("gone")
    with Path("model/metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "sample": "春'.encode()[:-1])
    assert main([*run, "--resume"]) == 0
    straight, resumed = (read_metrics(Path(name, "metrics.jsonl")) for name in ("straight", "model"))
    for name in ("train/loss", "train/tokens_seen", "validation/loss", "sample", "buckets/layer_0"):
        ours, theirs = ([(line["step"], line[name]) for line in lines if name in line] for lines in (straight, resumed))
        # The end of the first part was validated too, and dropped with its step 3.
        assert ours == theirs, name
    seconds = [line["train/seconds"] for line in resumed if "train/seconds" in line]
    assert seconds == sorted(seconds)
    starts = json.loads(Path("model/run.json").read_text(encoding="utf-8"))["starts"]
    assert [(start["step"], start["arguments"][-1]) for start in starts] == [(0, "2"), (2, "--resume")]
    page = Path("model/report.html").read_text(encoding="utf-8")
    assert "Finished after 5 steps" in page
    assert page.count("<li>") == 2
    best = min((line["validation/loss"], line["step"]) for line in resumed if "validation/loss" in line)
    assert f"<tr class=best><td>{best[1]}</td><td>{best[0]:.4f}</td>" in page


def test_the_commit_is_that_of_the_code_and_only_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1\n")
    monkeypatch.setattr(run_folder, "__file__", str(package / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of_the_code() is None
    git("init")
    (tmp_path / "other.txt").write_text("1\n")
    git("add", "other.txt")
    git("commit", "-m", "another project's")
    # In its folder, but not its own: as in a virtual environment.
    assert commit_of_the_code() is None
    git("add", "package")
    git("commit", "-m", "ours")
    assert commit_of_the_code() == {"hash": git("rev-parse", "HEAD"), "has_changes": False}
    (package / "code.py").write_text("2\n")
    assert commit_of_the_code() == {"hash": git("rev-parse", "HEAD"), "has_changes": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of_the_code() is None
