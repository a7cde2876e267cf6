"""The default vocabulary, and the command that builds vocabularies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from reformer_lm.text import DEFAULT_VOCABULARY, encode_article, load_tokenizer
from reformer_lm.text.vocabulary import default_vocabulary, main, write_vocabulary

ARTICLES = [
    "今天天气很好，我们去公园散步。\n公园里有很多人，孩子们在公园里跑来跑去。",
    "我们去公园散步，天气很好。他说：“Hello world, hello again, hello Tokenizer!”",
    "自然语言处理是一门学问。我们学习自然语言处理，公园里的人不学习。喆喆hello",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(ARTICLES, ensure_ascii=False), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_committed_default_vocabulary_is_what_the_code_builds(tmp_path: Path) -> None:
    rebuilt = tmp_path / "vocab.txt"
    assert run("--output", rebuilt) == 0
    assert rebuilt.read_bytes() == DEFAULT_VOCABULARY.read_bytes()


def test_the_module_runs_as_a_command_without_warnings(tmp_path: Path) -> None:
    rebuilt = tmp_path / "vocab.txt"
    command = [sys.executable, "-m", "reformer_lm.text.vocabulary", "--output", str(rebuilt)]
    root = DEFAULT_VOCABULARY.parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert rebuilt.read_bytes() == DEFAULT_VOCABULARY.read_bytes()


def test_contents_of_the_default_vocabulary() -> None:
    tokens = default_vocabulary()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(tokens)) == len(tokens)
    hanzi = [token for token in tokens if "\u4e00" <= token <= "\u9fff"]
    assert len(hanzi) == 6763
    assert {"啊", "座", "亍", "齄"} <= set(hanzi)
    for code in range(0x21, 0x7F):
        assert chr(code) in tokens
        assert f"##{chr(code)}" in tokens
    assert set("，。！？：；“”‘’—…·《》〈〉「」『』【】（）、〇～￥") <= set(tokens)
    assert not any(token.isspace() or not token for token in tokens)


def test_characters_of_a_corpus(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "vocab.txt"
    assert run("--corpus", corpus, "--output", output) == 0
    tokens = output.read_text(encoding="utf-8").splitlines()
    assert f"{len(tokens):,} tokens" in capsys.readouterr().out
    assert "喆" in tokens
    # By falling frequency: 公 and 园 stand five times in the articles.
    assert set(tokens[tokens.index("公") :][:2]) == {"公", "园"}
    tokenizer = load_tokenizer(output)
    for article in ARTICLES:
        ids = encode_article(tokenizer, article)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:-1]) == article.lower()


def test_min_frequency_and_vocab_size(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "vocab.txt"
    assert run("--corpus", corpus, "--output", output, "--min_frequency", 3) == 0
    tokens = output.read_text(encoding="utf-8").splitlines()
    assert "公" in tokens
    assert "喆" not in tokens
    size = len(tokens)
    assert run("--corpus", corpus, "--output", output, "--vocab_size", size - 2, "--min_frequency", 3) == 0
    assert output.read_text(encoding="utf-8").splitlines() == tokens[: size - 2]
    # Room for more: pieces of Latin words fill it.
    assert run("--corpus", corpus, "--output", output, "--vocab_size", size + 100, "--min_frequency", 3) == 0
    larger = output.read_text(encoding="utf-8").splitlines()
    assert larger[:size] == tokens
    assert "hello" in larger[size:]
    assert load_tokenizer(output).tokenize("hello") == ["hello"]


@pytest.mark.parametrize("mode", [(), ("--segment",), ("--bpe_token",)])
def test_building_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path, mode: Sequence[str]) -> None:
    def contents(output: Path) -> bytes:
        assert run("--corpus", corpus, *mode, "--vocab_size", 700, "--output", output) == 0
        return (output / "tokenizer.json" if mode else output).read_bytes()

    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_words(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "words"
    assert run("--corpus", corpus, "--segment", "--output", output) == 0
    tokenizer = load_tokenizer(output, segment=True)
    assert tokenizer.tokenize("我们去公园散步。") == ["我们", "去", "公园", "散步", "。"]
    assert tokenizer.tokenize("散步\nhello hello") == ["散步", "[SEP]", "hello", "▁hello"]
    # Not a word of the corpus: its characters; not a character of the corpus: [UNK].
    assert tokenizer.tokenize("公天")[0] == "公"
    assert tokenizer.convert_tokens_to_ids("公天") == tokenizer.unk_token_id
    assert tokenizer.encode("㐱㐲").count(tokenizer.unk_token_id) == 2


def test_the_saved_word_tokenizer_needs_no_jieba(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "words"
    assert run("--corpus", corpus, "--segment", "--output", output) == 0
    code = (
        "import sys; sys.modules['jieba'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(*AutoTokenizer.from_pretrained({str(output)!r}).tokenize('我们去公园散步'))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment)
    assert done.stdout.split() == ["我们", "去", "公园", "散步"]


def test_bpe(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "bpe"
    assert run("--corpus", corpus, "--bpe_token", "--vocab_size", 600, "--output", output) == 0
    tokenizer = load_tokenizer(output)
    assert len(tokenizer) <= 600
    text = "我们去公园散步\n\n自然语言处理, hello world."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) - 10
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_keep_case(tmp_path: Path, corpus: Path) -> None:
    for mode in ("--segment", "--bpe_token"):
        output = tmp_path / mode.strip("-")
        assert run("--corpus", corpus, mode, "--keep_case", "--output", output) == 0
        tokenizer = load_tokenizer(output, keep_case=True)
        assert tokenizer.decode(tokenizer.encode("Hello [MASK]")) == "Hello [mask]"
        assert tokenizer.bos_token_id not in tokenizer.encode("Hello [MASK]")


def test_several_corpora_are_read_together(tmp_path: Path, corpus: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("镕基\n", encoding="utf-8")
    output = tmp_path / "vocab.txt"
    assert run("--corpus", corpus, other, "--output", output) == 0
    assert {"镕", "喆"} <= set(output.read_text(encoding="utf-8").splitlines())


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.json").write_text("[]")
    cases: list[tuple[list[object], str]] = [
        (["--vocab_size", 100], "--corpus"),
        (["--segment"], "--corpus"),
        (["--corpus", corpus], "--output"),
        (["--corpus", corpus, "--output", tmp_path / "v.txt", "--vocab_size", 0], "--vocab_size must be"),
        (["--corpus", corpus, "--output", tmp_path / "v.txt", "--min_frequency", -1], "--min_frequency"),
        (
            ["--corpus", corpus, "--output", tmp_path / "v.txt", "--vocab_size", 10],
            "vocab_size 10 is too small",
        ),
        (["--corpus", corpus, "--output", tmp_path], "is a folder"),
        (["--corpus", corpus, "--output", tmp_path / "file" / "v.txt"], "cannot write"),
        (["--corpus", corpus, "--segment", "--output", tmp_path / "file"], "must be a folder"),
        (["--corpus", corpus, "--bpe_token", "--output", tmp_path / "v.txt"], "must be a folder"),
        (["--corpus", corpus, "--bpe_token", "--output", tmp_path / "file" / "bpe"], "cannot write"),
        (["--corpus", tmp_path / "none.json", "--output", tmp_path / "v.txt"], "none.json"),
        (["--corpus", tmp_path / "empty.json", "--output", tmp_path / "v.txt"], "empty"),
    ]
    for arguments, expected in cases:
        assert run(*arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert expected in printed.err
        assert printed.err.count("\n") == 1


def test_words_without_jieba_say_how_to_install_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert run("--corpus", corpus, "--segment", "--output", tmp_path / "words") == 2
    assert "pip install jieba" in capsys.readouterr().err
    assert not (tmp_path / "words").exists()


def test_interruption_exits_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reformer_lm.text.vocabulary.write_vocabulary", interrupt)
    assert run("--output", tmp_path / "vocab.txt") == 130


def test_vocabularies_are_written_with_line_feeds(tmp_path: Path) -> None:
    write_vocabulary(["[PAD]", "啊"], tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_bytes() == b"[PAD]\n\xe5\x95\x8a\n"
