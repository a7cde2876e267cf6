"""What the READMEs and the pages in docs/ print is true: commands parse, code runs, keys and files exist."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.convert.command import parse_arguments as parse_convert
from reformer_lm.prediction.arguments import parse_arguments as parse_predict
from reformer_lm.text import load_tokenizer
from reformer_lm.text.vocabulary import build_parser as vocabulary_parser
from reformer_lm.training.arguments import COMMAND_LINE_ONLY, TrainingArguments
from reformer_lm.training.arguments import parse_arguments as parse_train

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def commands_of_all_pages() -> list[list[str]]:
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("command", commands_of_all_pages(), ids=" ".join)
def test_commands_are_accepted(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match command:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        case ["python", "train_reformer.py", *arguments]:
            parse_train(arguments)
        case ["torchrun", "--nproc_per_node", _, "train_reformer.py", *arguments]:
            parse_train(arguments)
        case ["accelerate", "launch", "--config_file", file, "train_reformer.py", *arguments]:
            assert (ROOT / file).exists()
            parse_train(arguments)
        case ["python", "predict.py", *arguments] | ["torchrun", "--nproc_per_node", _, "predict.py", *arguments]:
            parse_predict(arguments)
        case ["pip", "install", requirement]:
            assert requirement in (ROOT / "requirements-slow.txt").read_text(encoding="utf-8")
        case ["python", script, *_] if script.startswith("examples/"):
            # They run in tests of their own.
            assert (ROOT / script).exists()
        case ["python", "-m", "reformer_lm.text.vocabulary", *arguments]:
            vocabulary_parser().parse_strictly(arguments)
        case ["python", "-m", "reformer_lm.convert", *arguments]:
            parse_convert(arguments)
        case _:
            pytest.fail(f"no check for {command}")


def test_both_languages_show_the_same_commands_code_and_figures() -> None:
    english, chinese = READMES
    for language in ("bash", "python"):
        without_comments = [
            [re.sub(r" +#.*", "", block) for block in blocks(page, language)] for page in (english, chinese)
        ]
        assert without_comments[0] == without_comments[1]
    figures = [
        set(re.findall(r"\d+(?:,\d{3})*\.\d+|\d+(?:,\d{3})+|\d+e-\d+", page.read_text(encoding="utf-8")))
        for page in READMES
    ]
    # Chinese counts parameters and characters in units of ten thousand.
    assert figures[0] - figures[1] <= {"4.2", "2.75", "2.5", "1.5"}
    assert figures[1] - figures[0] == set()


@pytest.fixture(scope="module")
def folder_with_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = load_tokenizer()
    config = ReformerLMConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ReformerLMForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


PRELUDE = """
from reformer_lm import ReformerLMForCausalLM
from reformer_lm.text import load_tokenizer
model, tokenizer = ReformerLMForCausalLM.from_pretrained("model/"), load_tokenizer("model/")
"""


# The Chinese README shows the code of the English one, as a test above makes sure.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name != "README.zh-CN.md"],
    ids=lambda page: page.name,
)
def test_python_code_runs(page: Path, folder_with_model: Path) -> None:
    for block in blocks(page, "python"):
        code = PRELUDE + block if "score(model" in block else block
        finished = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder_with_model,
            env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]


def test_every_key_is_documented_with_its_meaning() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    model_part, training_part = page.split("## Keys of the `model` part")[1].split("## Keys of the `training` part")
    documented = [set(re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE)) for part in (model_part, training_part)]
    model_keys = set(inspect.signature(ReformerLMConfig.__init__).parameters) - {"self", "kwargs"}
    training_keys = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert documented[0] == model_keys
    assert documented[1] == training_keys - set(COMMAND_LINE_ONLY)
    flags_only = page.split("are flags only")[0].splitlines()[-1]
    assert set(re.findall(r"`--(\w+)`", flags_only)) == set(COMMAND_LINE_ONLY)
    docstring = inspect.getdoc(ReformerLMConfig) or ""
    assert not [key for key in model_keys if f"{key}:" not in docstring and key != "use_cache"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "data" / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"`((?:tests|configs|docs|reformer_lm|ops|layers)/[\w./]+)`", text)
    roots = (ROOT, ROOT / "reformer_lm", page.parent)
    assert not [name for name in named if not any((root / name).exists() for root in roots)]


def test_figures_about_the_data_are_right() -> None:
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("train", "val"):
        articles = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))
        assert f"| `{name}.json` | {len(articles)} | {sum(map(len, articles)):,} |" in text
    train = json.loads((ROOT / "data" / "train.json").read_text(encoding="utf-8"))
    assert sum(len(article) > 4096 for article in train) == 4


def test_figures_of_the_readmes_are_those_of_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "first_steps.json").read_text(encoding="utf-8"))
    for page in READMES:
        text = page.read_text(encoding="utf-8")
        for job in ("demo", "novels"):
            result = results[job]
            for key in (
                "corpus_tokens",
                "steps",
                "validation_ppl_last",
                "tokens_per_second_median",
                "peak_resident_mb",
            ):
                assert f"{result[key]:,}" in text, (page.name, job, key)
        assert f"{results['demo']['validation_ppl_first']:,}" in text, page.name


def test_the_table_of_hash_ties_is_that_of_the_result_file() -> None:
    page = (ROOT / "docs" / "lsh_attention.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| ([\d,]+) \| (\d+) \| (\S+)(?: nats)? \|$", page, flags=re.MULTILINE)
    stated = [(int(count.replace(",", "")), int(flips), float(move)) for count, flips, move in rows]
    results = json.loads((ROOT / "benchmarks" / "results" / "hash_ties.json").read_text(encoding="utf-8"))["float32"]
    measured = [
        (
            result["hash_decisions"],
            result["decisions_that_fell_differently"],
            float(f"{result['largest_move_nats']:.1e}"),
        )
        for result in results
    ]
    assert stated == measured


def test_the_figures_of_the_future_leak_are_those_of_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "future_leak.json").read_text(encoding="utf-8"))
    moved = results["largest_change_of_an_earlier_logit"]
    peers = [f"{moved['reformer_pytorch']:.2f}", f"{moved['transformers']:.1f}"]
    exact = f"{moved['ours_causal']:.0e}"
    page = (ROOT / "docs" / "lsh_attention.md").read_text(encoding="utf-8")
    stated = [
        re.search(r"[\d.e-]+", cell).group()
        for cell in re.findall(r"^\|.*\| (\**\d\S*)[^|]*\|$", page, re.MULTILINE)[:4]
    ]
    assert stated == [*peers, f"{moved['ours_chunked']:.1f}", exact]
    for readme in READMES:
        line = next(
            line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("reformer-pytorch 0")
        )
        assert re.findall(r"\d+(?:\.\d+|e-\d+)", line)[:3] == [*peers, exact]


def test_parameter_counts_of_the_configurations_are_right() -> None:
    import torch

    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, stated in re.findall(r"\| `configs/(\w+)\.json` \| ([\d.]+) M", page):
        options = json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8"))["model"]
        with torch.device("meta"):
            model = ReformerLMForCausalLM(ReformerLMConfig(vocab_size=7254, **options))
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert float(stated) == pytest.approx(counted / 1e6, rel=0.03), name
