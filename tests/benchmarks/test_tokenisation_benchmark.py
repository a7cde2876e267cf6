"""The benchmark of tokenising: all contenders read the same text, and what is measured arrives in file and table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenisation
from machine import ROOT

from reformer_lm.text import DEFAULT_VOCABULARY, encode_article, load_tokenizer


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The benchmark pins its process to one core."""
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def python_tokenizer() -> tokenisation.PythonBertTokenizer:
    return tokenisation.PythonBertTokenizer(DEFAULT_VOCABULARY.read_text(encoding="utf-8").splitlines())


def test_the_rebuilt_tokenizer_is_berts(python_tokenizer: tokenisation.PythonBertTokenizer) -> None:
    assert python_tokenizer.tokenize("春天,Ab1é\x00！ [SEP] \u3000㐱") == [
        "春", "天", ",", "a", "##b", "##1", "##e", "！", "[SEP]", "[UNK]",
    ]  # fmt: skip
    assert python_tokenizer.tokenize("a" * 101) == ["[UNK]"]


def test_all_contenders_give_chinese_text_the_same_ids(python_tokenizer: tokenisation.PythonBertTokenizer) -> None:
    tokenizer = load_tokenizer()
    for article in json.loads((ROOT / "data" / "val.json").read_text(encoding="utf-8"))[:5]:
        # Only between hanzi: BERT's tokenisation knows no difference between "a, b" and "a,b".
        text = "".join(c for c in article if c > "\u007f" or c == "\n")
        tokens = python_tokenizer.tokenize(text.replace("\n", " [SEP] "))
        assert python_tokenizer.convert_tokens_to_ids(tokens) == encode_article(tokenizer, text)[1:-1]


def test_results_go_into_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "articles.json"
    corpus.write_text(json.dumps(["春天来了。\n花开了。", "第2章"] * 20), encoding="utf-8")
    out = ["--out", str(tmp_path / "tokenisation.json")]
    tokenisation.main(["--corpus", str(corpus), "--repetitions", "2", *out])
    results = json.loads((tmp_path / "tokenisation.json").read_text(encoding="utf-8"))
    assert results["corpus"] == "articles.json"
    assert set(results["contenders"]) == set(tokenisation.LABELS)
    for entry in results["contenders"].values():
        assert len(entry["seconds"]) == 2
        assert entry["tokens"] == (10 + 2 + 3 + 2) * 20
        assert entry["megabytes_per_second"] == pytest.approx(results["bytes"] / 1e6 / entry["median_s"])
    capsys.readouterr()
    tokenisation.main(["--report", *out])
    table = capsys.readouterr().out
    ratio = results["contenders"]["gpt2_chinese"]["median_s"] / results["contenders"]["ours"]["median_s"]
    assert f"| {ratio:.1f}x |" in table
    with pytest.raises(SystemExit):
        tokenisation.main(out)


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("tokenisation_*.json"):
        assert tokenisation.report(json.loads(path.read_text(encoding="utf-8"))).strip() in page, path.name
