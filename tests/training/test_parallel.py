"""Training in two processes: the same losses and weights as in one, sharded or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from reformer_lm.training import main
from reformer_lm.training.checkpoints import load_state

PROCESSES = 2
# Ten windows: the last step of an epoch has fewer than the others, and in two processes one that is empty.
RUN = """--raw --epochs 2 --batch_size 2 --max_seq_len 16 --stride 40 --eval_every 2 --lr 0.001 --quiet
    --num_pieces 1""".split()
OPTIONS = {
    "plain": [],
    "averaged": ["--ema", "0.5", "--noise", "0.2", "--optimizer", "muon"],
    "separate": ["--separate_articles", "--train_only", "stack"],
    "sgd": ["--optimizer", "sgd", "--lr", "0.1"],
}

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _no_dropout(workplace: Path) -> None:
    """Two processes cannot drop what one drops."""
    config = workplace / "configs" / "tiny.json"
    config.write_text(config.read_text().replace('"hidden_dropout_prob": 0.1', '"rehash": "step"'))


def train(rank: int, folder: str, port: int, runs: list[list[str]]) -> None:
    """One of the processes, as torchrun would start it."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    for run in runs:
        assert main(run) == 0, run


def in_two_processes(*runs: list[str]) -> None:
    torch.multiprocessing.spawn(train, args=(str(Path.cwd()), free_port(), list(runs)), nprocs=PROCESSES)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def metrics_of(folder: str) -> dict[str, Any]:
    return load_state(Path(folder))["progress"]


def assert_close(one: str, other: str) -> None:
    ours, theirs = load_file(Path(one) / "model.safetensors"), load_file(Path(other) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    expected = metrics_of(other)
    for name, value in metrics_of(one).items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
    assert json.loads(Path(one, "config.json").read_text()) == json.loads(Path(other, "config.json").read_text())


def test_two_processes_train_what_one_does() -> None:
    runs = []
    for name, options in OPTIONS.items():
        assert main([*RUN, "--gradient_accumulation", "2", *options, "--output_dir", f"one {name}"]) == 0
        for kind, flag in (("ddp", []), ("fsdp", ["--fsdp"])):
            runs.append([*RUN, *options, *flag, "--output_dir", f"{kind} {name}"])
    in_two_processes(*runs)
    for name in OPTIONS:
        assert_close(f"ddp {name}", f"one {name}")
        assert_close(f"fsdp {name}", f"one {name}")


# Four more processes; that two train what one does is tested above.
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes() -> None:
    # A constant rate, which does not depend on where a run is to end.
    two = [*RUN, "--lr_schedule", "constant", "--warmup_steps", "0", "--ema", "0.5", "--optimizer", "muon"]
    one = [*two, "--gradient_accumulation", "2"]
    stop = ["--max_steps", "2"]
    assert main([*one, "--output_dir", "straight"]) == 0
    assert main([*one, *stop, "--output_dir", "one, then fsdp"]) == 0
    in_two_processes(
        [*two, *stop, "--fsdp", "--output_dir", "fsdp, then one"],
        [*two, *stop, "--output_dir", "ddp, then fsdp"],
        [*two, "--fsdp", "--resume", "--output_dir", "one, then fsdp"],
        [*two, "--fsdp", "--resume", "--output_dir", "ddp, then fsdp"],
    )
    assert main([*one, "--resume", "--output_dir", "fsdp, then one"]) == 0
    for folder in ("one, then fsdp", "fsdp, then one", "ddp, then fsdp"):
        assert_close(folder, "straight")


@pytest.mark.slow
def test_torchrun_starts_it_and_a_signal_ends_it_in_all_processes(workplace: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(Path(__file__).parents[2] / "train_reformer.py"), *RUN[:-3], "--epochs", "1000", "--save_every", "1",
    ]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=workplace, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "saved" in line:
            process.terminate()
            break
    lines += process.stdout.readlines()
    process.wait()
    assert any("2 processes" in line for line in lines)
    assert [line for line in lines if line.startswith("stopped and saved at step")], lines


@pytest.mark.parametrize(("flags", "fragment"), [(["--fsdp"], "torchrun"), (["--fsdp", "--fp16"], "CUDA device")])
def test_fsdp_where_it_cannot_be(flags: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *flags]) == 2
    assert fragment in capsys.readouterr().err
