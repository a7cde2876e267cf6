"""The README's commands, typed one after the other by a new user; minutes, so run by `make test-slow`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path) -> None:
    for name in ("reformer_lm", "configs", "data", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "tokenized"))
    for name in ("train_reformer.py", "predict.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    # A step on a million tokens has a benchmark of its own, and examples have tests.
    elsewhere = re.compile("million|^python examples/")
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ") and not elsewhere.search(line)]
    assert [command[0] for command in commands] == ["train_reformer.py", *["predict.py"] * 4]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    outputs = []
    for command in commands:
        finished = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        outputs.append(finished.stdout)

    training, generated, scored, compared, _ = outputs
    assert "A is more fluent" in compared
    assert "Least fluent passages" in (tmp_path / "report.html").read_text(encoding="utf-8")
    first, last = (
        float(x.replace(",", "")) for x in re.search(r"PPL ([\d,.]+) at first, ([\d,.]+) now", training).groups()
    )
    assert last < first / 2
    # The state of a run on the CPU follows from its seed, but for the order of additions on another machine.
    stated = json.loads((ROOT / "benchmarks" / "results" / "first_steps.json").read_text())["demo"]
    assert math.isclose(last, stated["validation_ppl_last"], rel_tol=0.05)
    assert re.search(r"清晨的车站.*[\u4e00-\u9fff]{5}", generated, flags=re.DOTALL)
    stated_scores = re.search(r"```\n([\d.]+\t.*?)```", text, flags=re.DOTALL).group(1)
    for line, stated_line in zip(scored.splitlines(), stated_scores.splitlines(), strict=True):
        assert line.split("\t")[1:] == stated_line.split("\t")[1:]
        assert math.isclose(float(line.split("\t")[0]), float(stated_line.split("\t")[0]), rel_tol=0.25)
    perplexities = [float(line.split("\t")[0]) for line in scored.splitlines()]
    assert perplexities[0] < perplexities[1]
