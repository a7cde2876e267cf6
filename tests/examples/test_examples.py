"""The example scripts, with settings that take a second each; and what their README says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import addition
import baby_gpt
import char_lm
import copy_task
import pytest
import run_notebook
import torch

from reformer_lm import InputError
from reformer_lm.prediction.arguments import parse_arguments as parse_predict
from reformer_lm.text.vocabulary import build_parser as vocabulary_parser
from reformer_lm.training.arguments import parse_arguments as parse_train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
NOTEBOOK = EXAMPLES / "annotated_reformer.ipynb"
SCRIPTS = [addition, baby_gpt, char_lm, copy_task]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_copy_task_is_learned() -> None:
    small = "--word 5 --symbols 8 --hidden_size 32 --steps 150 --lr 0.01 --quiet".split()
    # Chance is 0.125.
    assert copy_task.main(small) > 0.6


def test_strings_are_repeated_and_only_the_repetition_counts() -> None:
    arguments = copy_task.build_parser().parse_strictly(["--word", "4", "--batch", "3"])
    batch = next(copy_task.batches(arguments, torch.Generator().manual_seed(0)))
    assert torch.equal(batch["input_ids"][:, :5], batch["input_ids"][:, 5:])
    assert ((batch["labels"] != -100).nonzero()[:, 1].view(3, 4) == torch.arange(6, 10)).all()


def test_sums_are_right() -> None:
    rows = addition.sums(torch.tensor([85 * 100 + 50, 99 * 100 + 99, 7]), 2).tolist()
    assert rows == [[8, 5, 5, 0, 5, 3, 1], [9, 9, 9, 9, 8, 9, 1], [0, 0, 0, 7, 7, 0, 0]]


@pytest.mark.slow
def test_sums_are_learned_and_others_are_held_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[torch.Tensor] = []
    original = addition.batches

    def noted(pairs: torch.Tensor, *others: object) -> object:
        seen.append(pairs)
        return original(pairs, *others)

    judged: list[torch.Tensor] = []
    accuracy = addition.accuracy
    monkeypatch.setattr(addition, "batches", noted)
    monkeypatch.setattr(addition, "accuracy", lambda m, pairs, d: (judged.append(pairs), accuracy(m, pairs, d))[1])
    share = addition.main("--digits 1 --steps 120 --hidden_size 32 --layers 1 --quiet --lr 0.01".split())
    # Eighty sums are learned by heart; that tells how to add only where there are more.
    learned, of_others = re.search(r"([\d.]+)% of 80 .* ([\d.]+)% of 20", capsys.readouterr().out).groups()
    assert float(learned) > 90 and float(of_others) == pytest.approx(100 * share)
    assert len(judged[-1]) == 20
    assert not set(judged[-1].tolist()) & set(seen[0].tolist())


def test_a_text_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be.\n\n" * 40, encoding="utf-8")
    tiny = "--context 16 --batch 4 --hidden_size 16 --layers 1 --steps 60 --lr 0.01 --sample 12 --quiet".split()
    loss = char_lm.main(["--text", str(text), *tiny])
    written = capsys.readouterr().out
    assert "878 characters, 11 different ones" in written
    assert loss < 1.5
    # Capitals and blank lines are characters like others.
    assert set(written.split("(nats a character)\n")[1]) <= set("To be, or not to be.\n")
    again = char_lm.main(["--text", str(text), *tiny])
    assert (again, capsys.readouterr().out) == (loss, written)


def test_the_baby_gpt_learns_its_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "chain.png"
    after = baby_gpt.main(["--quiet", "--picture", str(picture)])
    # In 111101111011110 a zero is followed by ones, until there are four.
    assert after[(0, 1, 1)][1] > 0.9 and after[(1, 0, 1)][1] > 0.9
    assert 0.2 < after[(1, 1, 1)][1] < 0.8
    assert all(sum(row) == pytest.approx(1) for row in after.values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^000 +never there", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "arguments", "fragment"),
    [
        (copy_task, ["--steps", "0"], "whole number of at least 1"),
        (copy_task, ["--hidden_size", "30"], "multiple of 4"),
        (addition, ["--digits", "9"], "give 1 to 4"),
        (addition, ["--digit", "2"], "did you mean --digits?"),
        (baby_gpt, ["--sequence", "0120"], "zeros and ones"),
        (char_lm, ["--text", "nowhere.txt"], "nowhere.txt"),
        (char_lm, ["--context", "100000"], "give a longer text, or --context"),
        (run_notebook, ["nowhere.ipynb"], "give a .ipynb file"),
    ],
)
def test_wrong_input_is_explained(script: ModuleType, arguments: list[str], fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        script.main(arguments)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_scripts_run_without_an_installation_and_end_with_one_line(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "addition.py"), "--digits", "9"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr == "error: --digits is 9; give 1 to 4\n"


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_readmes_commands_are_accepted(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match command:
        case ["python", "train_reformer.py", *arguments]:
            parse_train(arguments)
        case ["python", "predict.py", *arguments]:
            parse_predict(arguments)
        case ["python", "-m", "reformer_lm.text.vocabulary", *arguments]:
            vocabulary_parser().parse_strictly(arguments)
        case ["python", script, *arguments] if Path(script).stem in {"serve", "lm_eval_harness"}:
            assert (ROOT / script).exists() and arguments
        case ["python", script, *arguments]:
            assert (ROOT / script).parent == EXAMPLES
            importlib.import_module(Path(script).stem).build_parser().parse_strictly(arguments)
        case _:
            pytest.fail(f"no check for {command}")


def test_the_readme_names_every_example_and_links_to_what_exists() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"}} - {"example.py"}
    assert {name for name in names if f"## `{name}`" not in README} == set()
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and all((EXAMPLES / target).exists() for target in targets)


def test_the_notebook_is_stored_with_its_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    # All but the first, which imports.
    assert all(cell["outputs"] for cell in cells[1:])


def test_notebooks_keep_what_cells_print_and_say_which_fails(tmp_path: Path) -> None:
    def cell(source: str) -> dict[str, object]:
        return {"cell_type": "code", "source": [source], "outputs": []}

    notebook = {
        "cells": [cell("x = 3"), {"cell_type": "markdown", "source": ["# 1 /"]}, cell("print(x)\nprint(x + 1)")]
    }
    run_notebook.execute(notebook, "n.ipynb", pictures=False)
    assert notebook["cells"][2]["outputs"][0]["text"] == ["3\n", "4\n"]
    assert (notebook["cells"][0]["outputs"], notebook["cells"][2]["execution_count"]) == ([], 2)
    notebook["cells"].append(cell("1 / 0"))
    with pytest.raises(InputError, match="n.ipynb, code cell 3: ZeroDivisionError"):
        run_notebook.execute(notebook, "n.ipynb", pictures=False)


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_it_said() -> None:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    fresh = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run_notebook.execute(fresh, NOTEBOOK.name)
    for one, other in zip(stored["cells"], fresh["cells"], strict=True):
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (one, other)]
        assert kinds[0] == kinds[1]
    text = "".join(
        line for cell in fresh["cells"] for output in cell.get("outputs", []) for line in output.get("text", [])
    )
    assert float(re.search(r"accuracy on the second w of new strings: ([\d.]+)%", text).group(1)) > 80
    differences = [float(value) for value in re.findall(r"differs? by at most ([\d.e+-]+)", text)]
    assert len(differences) == 5 and max(differences) < 1e-4
    causal, chunked = (float(re.search(rf"{mask} +([\d.e+-]+)", text).group(1)) for mask in ("causal", "chunked"))
    assert causal < 1e-9 < 1e-3 < chunked
