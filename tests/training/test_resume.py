import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reformer_lm.training import main
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.loop import TrainingLoop
from reformer_lm.training.state import seed_everything

# Six steps of two batches; four steps an epoch, the last of them smaller; dropout and changing rotations draw random
# numbers in each.
RUN = """--raw --epochs 2 --batch_size 2 --gradient_accumulation 2 --max_seq_len 16 --stride 27 --max_steps 6
    --eval_every 2""".split()


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path) -> None:
    config = workplace / "configs" / "tiny.json"
    config.write_text(config.read_text().replace('"bucket_size"', '"rehash": "step", "bucket_size"'))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send a signal to this process in the middle of a step."""
    train_step = TrainingLoop._train_step

    def interrupted(loop: TrainingLoop, windows: object) -> object:
        if loop.progress.step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(loop, windows)

    monkeypatch.setattr(TrainingLoop, "_train_step", interrupted)


def assert_same_run(one: str, other: str) -> None:
    ours, theirs = load_file(Path(one) / "model.safetensors"), load_file(Path(other) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    our_state, their_state = load_state(Path(one)), load_state(Path(other))
    assert our_state["progress"] == their_state["progress"]
    assert torch.equal(our_state["random"][0]["torch"], their_state["random"][0]["torch"])
    for key, entry in our_state["optimizer"]["state"].items():
        assert all(torch.equal(entry[name], their_state["optimizer"]["state"][key][name]) for name in entry)


def validations(folder: str) -> list[tuple[int, float]]:
    """Step and loss of each validation of a run."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["validation/loss"]) for line in lines if "validation/loss" in line]


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not Python's own everywhere: a shell's background jobs ignore it.
    handler = signal.getsignal(signal.SIGINT)
    assert main([*RUN, "--output_dir", "straight"]) == 0
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        assert main([*RUN, "--output_dir", "broken off"]) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"stopped and saved at step {step}; continue with: ")
    assert max(path.name for path in Path("broken off/checkpoints").iterdir()) == f"step-{step:08d}"

    # What the process did in between must not matter.
    seed_everything(123)
    command = shlex.split(last_line.split("continue with: ")[1])
    assert "--raw" not in command
    assert main(command[command.index("--epochs") :]) == 0
    assert f"step {step}" in capsys.readouterr().out
    assert_same_run("straight", "broken off")
    # Step 4 is stopped when a validation is due, which the resumed run makes up for.
    assert validations("broken off") == validations("straight")


def test_resumed_from_an_earlier_checkpoint_equals_uninterrupted() -> None:
    assert main([*RUN, "--output_dir", "model", "--save_every", "5"]) == 0
    shutil.copytree("model", "again")
    shutil.rmtree("again/checkpoints/step-00000006")
    assert main([*RUN, "--output_dir", "again", "--resume"]) == 0
    assert_same_run("model", "again")


def test_same_command_same_weights() -> None:
    assert main([*RUN, "--output_dir", "one"]) == 0
    seed_everything(123)
    assert main([*RUN, "--output_dir", "two", "--save_every", "1", "--sample_every", "2"]) == 0
    assert_same_run("one", "two")
    assert main([*RUN, "--output_dir", "three", "--seed", "7"]) == 0
    ours, theirs = load_file("one/model.safetensors"), load_file("three/model.safetensors")
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if "embedding" in name)


def test_finished_runs_stay_and_more_epochs_continue_them(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*RUN[:-4], "--warmup_steps", "0"]
    assert main([*run, "--lr_schedule", "constant"]) == 0
    total = load_state(Path("model"))["progress"]["step"]
    before = Path("model/model.safetensors").read_bytes()
    assert main([*run, "--lr_schedule", "constant", "--resume"]) == 0
    assert Path("model/model.safetensors").read_bytes() == before
    assert "had all its steps already" in capsys.readouterr().err

    # The final folder alone is enough, and with a constant rate more epochs are the same as more at once.
    shutil.rmtree("model/checkpoints")
    more = [*run, "--lr_schedule", "constant", "--epochs", "3"]
    assert main([*more, "--resume"]) == 0
    assert load_state(Path("model"))["progress"]["step"] == total * 3 // 2
    assert main([*more, "--output_dir", "at once"]) == 0
    assert_same_weights("model", "at once")


def assert_same_weights(one: str, other: str) -> None:
    ours, theirs = load_file(Path(one) / "model.safetensors"), load_file(Path(other) / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_terminated_run_is_saved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(2, monkeypatch, signal.SIGTERM)
    assert main(RUN) == 0
    assert load_state(Path("model"))["progress"]["step"] == 2


def test_a_stop_before_the_first_step_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(RUN) == 0
    before = Path("model/model.safetensors").read_bytes()
    validate = TrainingLoop._validate
    monkeypatch.setattr(TrainingLoop, "_validate", lambda loop: (os.kill(os.getpid(), signal.SIGINT), validate(loop)))
    assert main([*RUN, "--seed", "3"]) == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert Path("model/model.safetensors").read_bytes() == before


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def twice(loop: TrainingLoop, windows: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(TrainingLoop, "_train_step", twice)
    assert main(RUN) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not Path("model/checkpoints").exists()


def test_notes_on_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--max_steps", "3"]) == 0
    assert main([*RUN, "--resume", "--lr", "0.02"]) == 0
    assert "--lr was 0.01 before, now 0.02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (["--stride", "8"], "--stride was 27, now 8"),
        (["--seed", "8"], "--seed was 42, now 8"),
        (["--max_seq_len", "8"], "--max_seq_len was 16, now 8"),
        (["--min_length", "29", "--raw_data_path", "data/val.json"], "the training corpus was another one"),
        (["--output_dir", "nowhere"], "no checkpoint in nowhere"),
        (["--pretrained_model", "model"], "both given"),
        (["--model_config", "large.json"], "a checkpoint of another shape"),
        (["--tokenizer_path", "other.txt"], "is another tokenizer than the checkpoint's"),
    ],
)
def test_what_cannot_be_resumed_is_said_in_one_line(
    changes: list[str], fragment: str, vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--max_steps", "2"]) == 0
    large = Path("configs/tiny.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    Path("large.json").write_text(large)
    tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    Path("other.txt").write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]), encoding="utf-8")
    capsys.readouterr()
    assert main([*RUN, "--resume", *changes]) == 2
    captured = capsys.readouterr().err
    assert captured.splitlines()[-1].startswith("error: ")
    assert fragment in captured.splitlines()[-1]
    assert "Traceback" not in captured


def test_restore_latest_starts_where_there_is_nothing_and_continues_where_there_is() -> None:
    assert main([*RUN, "--output_dir", "straight"]) == 0
    for steps in ("2", "4", "6"):
        # The learning rate is to be that of the whole run.
        assert main([*RUN, "--restore", "latest", "--lr_schedule", "constant", "--max_steps", steps]) == 0
        assert load_state(Path("model"))["progress"]["step"] == int(steps)
    assert main([*RUN, "--restore", "latest", "--lr_schedule", "constant", "--output_dir", "at once"]) == 0
    assert_same_weights("model", "at once")
    assert main([*RUN, "--restore", "fresh"]) == 0
    assert_same_weights("model", "straight")


def test_restored_from_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--save_every", "1", "--save_total_limit", "10"]) == 0
    shutil.copytree("model", "other")
    # A step of the run itself: what came after it goes with the first save.
    assert (
        main([*RUN, "--restore", "model/checkpoints/step-00000002", "--max_steps", "3", "--save_total_limit", "9"]) == 0
    )
    assert [path.name[-1] for path in sorted(Path("model/checkpoints").iterdir())] == ["1", "2", "3"]
    # Another run's: it takes the place of the one that was here.
    assert main([*RUN, "--restore", "other/checkpoints/step-00000004"]) == 0
    assert [path.name[-1] for path in sorted(Path("model/checkpoints").iterdir())] == ["6"]
    assert_same_run("model", "other")
    capsys.readouterr()
    assert main([*RUN, "--restore", "nowhere"]) == 2
    assert "no checkpoint in nowhere" in capsys.readouterr().err
    assert main([*RUN, "--restore", "fresh", "--resume"]) == 2
    assert "choose one" in capsys.readouterr().err
