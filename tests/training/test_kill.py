"""A run that is killed, at whatever moment, and continued ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed_runs import KillableRuns, environment
from safetensors.torch import load_file

from reformer_lm.training.checkpoints import CheckpointStore, load_state

# Everything that has a state: dropout and changing rotations, momentum, averages, noise, validations; four steps an
# epoch, the last of them smaller.
RUN = """--raw --batch_size 2 --gradient_accumulation 2 --max_seq_len 16 --stride 27 --save_every 1 --eval_every 3
    --optimizer muon --ema 0.9 --noise 0.1 --lr_schedule wsd --restore latest --quiet""".split()


@pytest.fixture
def runs(workplace: Path) -> Iterator[KillableRuns]:
    config = workplace / "configs" / "tiny.json"
    config.write_text(config.read_text().replace('"bucket_size"', '"rehash": "step", "bucket_size"'))
    with KillableRuns(workplace) as killable:
        yield killable


def assert_same_run(one: str, other: str) -> None:
    """Model, best model and training state of two output folders."""
    for name in ("model.safetensors", "best/model.safetensors"):
        ours, theirs = load_file(Path(one) / name), load_file(Path(other) / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert_same_state(load_state(Path(one)), load_state(Path(other)), "state")


def assert_same_state(ours: object, theirs: object, place: str) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours.keys() - {"options"}:
            assert_same_state(ours[key], theirs[key], f"{place} {key}")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_state(one, other, f"{place} {number}")
    elif isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def newest_step(output_dir: str) -> int:
    complete = CheckpointStore(output_dir).complete()
    return int(complete[-1].name[5:]) if complete else 0


# Each kill costs a process that loads everything anew.
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, runs: KillableRuns) -> None:
    steps = 8 * kills
    run = [*RUN, "--epochs", "100", "--max_steps", str(steps)]
    begin = time.perf_counter()
    assert runs.run([*run, "--output_dir", "straight"]) == 0, runs.log.read_text()
    seconds_per_step = (time.perf_counter() - begin) / steps

    choice = random.Random(0)
    killed = 0
    while killed < kills:
        before = newest_step("killed")
        runs.start([*run, "--output_dir", "killed"])
        # It must come farther each time; then the moment is anywhere in the next three steps, each of which saves.
        while newest_step("killed") == before and before < steps:
            time.sleep(0.001)
        time.sleep(choice.uniform(0, 3 * seconds_per_step))
        runs.kill()
        assert runs.wait() == -signal.SIGKILL, runs.log.read_text()
        killed += 1
    assert 0 < newest_step("killed") < steps
    assert runs.run([*run, "--output_dir", "killed"]) == 0, runs.log.read_text()
    assert_same_run("straight", "killed")
    assert "Traceback" not in runs.log.read_text()


def test_killed_at_every_kind_of_file_operation(runs: KillableRuns) -> None:
    run = [*RUN, "--epochs", "100", "--max_steps", "4"]
    assert runs.run([*run, "--output_dir", "straight"], folder="straight") == 0, runs.log.read_text()
    events = runs.events()
    assert events > 100
    # With a step between the places that is prime to what repeats, over all of a run's saves.
    for place in range(3, events, max(1, events // 14)):
        folder = f"killed{place}"
        assert runs.run([*run, "--output_dir", folder], place=place, folder=folder) == -signal.SIGKILL
        assert runs.run([*run, "--output_dir", folder]) == 0, runs.log.read_text()
        assert_same_run("straight", folder)
        assert [path.name for path in sorted(Path(folder, "checkpoints").iterdir())] == [
            path.name for path in sorted(Path("straight/checkpoints").iterdir())
        ]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(runs: KillableRuns, workplace: Path) -> None:
    # A limit on the size of files stands in for a full disk: the first checkpoint fits, the next ones do not, until
    # there is room again.
    program = """
import resource, signal, sys
from reformer_lm.training import main, loop

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = loop.TrainingLoop._save
def limited(self, **options):
    room = 100 if self.progress.step in (2, 3) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        save(self, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
loop.TrainingLoop._save = limited
sys.exit(main(sys.argv[1:]))
"""
    run = [*RUN, "--epochs", "100", "--output_dir", "model"]
    full = subprocess.run(
        [sys.executable, "-c", program, *run, "--max_steps", "3"],
        cwd=workplace, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert full.returncode == 2, full.stderr
    notes = [line for line in full.stderr.splitlines() if "cannot be saved" in line]
    assert notes[0].startswith("note: ") and notes[0].endswith("training goes on")
    assert notes[-1].startswith("error: ")
    assert "Traceback" not in full.stderr
    # What was there stays whole, and the run goes on from it as if nothing had been.
    assert [path.name for path in Path("model/checkpoints").iterdir()] == ["step-00000001"]
    assert runs.run([*RUN, "--epochs", "100", "--max_steps", "3", "--output_dir", "model"]) == 0
    assert runs.run([*RUN, "--epochs", "100", "--max_steps", "3", "--output_dir", "straight"]) == 0
    assert_same_run("straight", "model")


def test_signals_end_a_run_with_success_and_the_command_that_continues(runs: KillableRuns) -> None:
    run = [word for word in RUN if word not in ("--quiet",)]
    run = [*run, "--epochs", "100", "--max_steps", "400", "--output_dir", "model"]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = newest_step("model")
        runs.start(run)
        while newest_step("model") == before:
            time.sleep(0.001)
        assert runs._child is not None
        os.kill(runs._child, number)
        assert runs.wait() == 0
        last = runs.log.read_text().splitlines()[-1]
        assert last.startswith(f"stopped and saved at step {newest_step('model')}; continue with: ")
        assert last.endswith("--resume") and "--restore" not in last
