"""From the options of a run to its token streams: reuse, splits, leaks, corpora of other programs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import TokenStream, read_index
from reformer_lm.errors import InputError
from reformer_lm.text import encode_article
from reformer_lm.training.arguments import parse_arguments
from reformer_lm.training.corpora import prepare_training_stream, prepare_validation_stream
from reformer_lm.training.reporting import Reporter

Prepare = Callable[..., tuple[TokenStream, TokenStream | None, list[str], list[str]]]


@pytest.fixture
def prepare(workplace: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Both streams of a run, and what it said on stdout and stderr."""

    def call(*argv: str) -> tuple[TokenStream, TokenStream | None, list[str], list[str]]:
        request = parse_arguments(list(argv))
        capsys.readouterr()
        with Reporter() as reporter:
            training, _ = prepare_training_stream(request, tokenizer, reporter)
            validation = prepare_validation_stream(request, tokenizer, reporter)
        captured = capsys.readouterr()
        return training, validation, captured.out.splitlines(), captured.err.splitlines()

    return call


def tokens(stream: TokenStream | None) -> list[int]:
    assert stream is not None
    return stream.read(0, len(stream)).tolist()


def encoded(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> list[int]:
    return [number for article in articles for number in encode_article(tokenizer, article)]


def test_several_files_folders_and_patterns(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, articles: list[str], prepare: Prepare
) -> None:
    Path("texts/deep").mkdir(parents=True)
    for number, article in enumerate(articles[2:]):
        Path(f"texts/deep/{number:02d}.txt").write_text(article, encoding="utf-8")
    Path("more.jsonl").write_text(json.dumps({"body": "春天"}), encoding="utf-8")
    given = ["--raw_data_path", "more.jsonl", "texts", "--text_field", "body", "--val_data_path", "data/val.json"]
    training, validation, lines, notes = prepare("--raw", *given)
    assert tokens(training) == encoded(tokenizer, ["春天", *articles[2:]])
    assert tokens(validation) == encoded(tokenizer, articles[:2])
    assert "11 files from more.jsonl on: tokenising into data/tokenized/train" in lines
    assert not notes
    # The same from a configuration file, and without --raw.
    content = json.loads(Path("configs/tiny.json").read_text())
    content["training"] |= {"raw_data_path": ["more.jsonl", "texts/**/*.txt"], "text_field": "body"}
    Path("configs/tiny.json").write_text(json.dumps(content))
    again, _, lines, _ = prepare("--raw", "--val_data_path", "data/val.json")
    assert tokens(again) == tokens(training)
    assert "11 files from more.jsonl on: already tokenised, reusing data/tokenized/train" in lines
    prepare()
    for changed in (
        lambda: Path("texts/new.txt").write_text("夏", encoding="utf-8"),
        lambda: Path("texts/deep/03.txt").write_text("夏", encoding="utf-8"),
    ):
        changed()
        with pytest.raises(InputError, match="run again with --raw"):
            prepare()
        Path("texts/new.txt").unlink(missing_ok=True)
    with pytest.raises(InputError, match="--text_field body, not title"):
        prepare("--text_field", "title")


def test_encoding_and_articles_of_text_files(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, articles: list[str], prepare: Prepare
) -> None:
    Path("a.txt").write_bytes("\n".join(articles[2:]).encode("gb18030"))
    Path("v.txt").write_bytes("\n".join(articles[:2]).encode("gb18030"))
    given = ["--raw", "--raw_data_path", "a.txt", "--val_data_path", "v.txt", "--txt_articles", "line"]
    with pytest.raises(InputError, match=r"a.txt: invalid UTF-8.*--encoding gb18030"):
        prepare(*given)
    training, validation, _, notes = prepare(*given, "--encoding", "gb18030")
    assert tokens(training) == encoded(tokenizer, articles[2:])
    assert tokens(validation) == encoded(tokenizer, articles[:2])
    assert not notes
    assert read_index("data/tokenized/train").reading.encoding == "gb18030"
    # Another reading is another corpus.
    whole, *_ = prepare(*given[:-1], "file", "--encoding", "gb18030")
    assert tokens(whole) == encoded(tokenizer, ["\n".join(articles[2:])])


def test_a_split_takes_the_place_of_validation_text(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, articles: list[str], prepare: Prepare
) -> None:
    training, validation, lines, notes = prepare("--raw", "--val_split", "0.3")
    assert sorted(tokens(training) + tokens(validation)) == sorted(encoded(tokenizer, articles))
    assert not notes
    held_out = [
        article for article in articles if str(encode_article(tokenizer, article))[1:-1] in str(tokens(validation))
    ]
    assert tokens(training) == encoded(tokenizer, [article for article in articles if article not in held_out])
    assert 0 < len(held_out) < len(articles) / 2

    # Order, files, seed and duplicates change nothing.
    Path("one.json").write_text(json.dumps(articles[::-1]), encoding="utf-8")
    Path("two.txt").write_text("\n\n".join(articles[3:7]), encoding="utf-8")
    _, other, _, notes = prepare("--raw", "--raw_data_path", "one.json", "two.txt", "--val_split", "0.3", "--seed", "7")
    assert set(tokens(other)) == set(tokens(validation))
    twice = [a for a in [*articles[::-1], *articles[3:7]] if a in held_out]
    assert tokens(other) == encoded(tokenizer, twice)
    assert not notes

    # Both sides are used again, with and without the flags.
    prepare("--raw", "--val_split", "0.3")
    for argv in (["--raw", "--val_split", "0.3"], ["--val_split", "0.3"], []):
        again, held, lines, _ = prepare(*argv)
        assert (tokens(again), tokens(held)) == (tokens(training), tokens(validation))
        assert any("reusing" in line for line in lines)
        assert not any("tokenising into" in line for line in lines)
    with pytest.raises(InputError, match="--val_split 0.3, not 0.5"):
        prepare("--val_split", "0.5")
    # Other validation text does not destroy the split.
    prepare("--val_data_path", "data/val.json")
    assert tokens(prepare()[1]) == tokens(validation)
    # A damaged side is made anew with --raw, and refused by name without.
    path = Path("data/tokenized/validation_split/tokens-00000.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"validation_split/tokens-00000.bin.*truncated"):
        prepare()
    assert tokens(prepare("--raw", "--val_split", "0.3")[1]) == tokens(validation)


def test_validation_articles_in_the_training_text_are_named(
    workplace: Path, articles: list[str], prepare: Prepare
) -> None:
    def with_breaks(article: str) -> str:
        return " " + article[:7] + "\n\n" + article[7:] + "\u3000"

    Path("data/val.json").write_text(json.dumps(["春雪", *map(with_breaks, articles[:4])]), encoding="utf-8")
    _, _, _, notes = prepare("--raw")
    (note,) = notes
    assert note.startswith("note: 4 of 5 validation articles also stand in the training text")
    assert all(articles[number][:7] in note for number in range(3))
    assert articles[3][:7] not in note
    # And again, when all is reused.
    assert prepare()[3] == notes
    Path("data/val.json").write_text(json.dumps(["春雪"]), encoding="utf-8")
    assert prepare()[3] == []


def test_files_that_gpt2_chinese_has_tokenised(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, articles: list[str], prepare: Prepare
) -> None:
    folder = Path("data/tokenized")
    folder.mkdir()
    for number in range(3):
        ids = encoded(tokenizer, articles[2 + number :: 3][:3])
        (folder / f"tokenized_train_{number}.txt").write_text(" ".join(map(str, ids)) + " ")
    expected = [a for number in range(3) for a in articles[2 + number :: 3][:3]]
    training, _, lines, notes = prepare()
    assert tokens(training) == encoded(tokenizer, expected)
    assert training.num_articles == len(expected)
    assert any(line.startswith("3 files from data/tokenized/tokenized_train_0.txt on: tokenising") for line in lines)
    assert not notes
    # Shards were made of them, which follow the files.
    assert any("already tokenised" in line for line in prepare()[2])
    (folder / "tokenized_train_1.txt").write_text(" ".join(map(str, encode_article(tokenizer, "春天"))))
    changed, *_ = prepare("--num_pieces", "3")
    assert changed.num_articles == 7
    with pytest.raises(InputError, match=r"holds 3 files such as tokenized_train_0.txt, not --num_pieces 4"):
        prepare("--num_pieces", "4")
    (folder / "tokenized_train_1.txt").unlink()
    with pytest.raises(InputError, match="tokenized_train_1.txt: missing"):
        prepare()
    (folder / "tokenized_train_1.txt").write_text(f"4 {len(tokenizer)}")
    with pytest.raises(InputError, match=r"tokenized_train_1.txt: article 1 has the token id"):
        prepare()
    # --raw is about the text; its shards are the ones that count from then on.
    raw, *_ = prepare("--raw")
    assert tokens(raw) == encoded(tokenizer, articles)
    assert tokens(prepare()[0]) == tokens(raw)


def test_leaks_are_found_in_token_ids_too(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, articles: list[str], prepare: Prepare
) -> None:
    np.savez_compressed("a.npz", *(np.array(tokenizer.encode(article)) for article in articles))
    training, _, _, notes = prepare("--raw", "--raw_data_path", "a.npz")
    assert tokens(training) == encoded(tokenizer, articles)
    assert "2 of 2 validation articles" in notes[0]


def test_an_interruption_is_continued(
    workplace: Path,
    tokenizer: PreTrainedTokenizerFast,
    articles: list[str],
    prepare: Prepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reformer_lm.corpus import blocks

    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 60)
    write = blocks.BlockFolder.write

    def interrupted(self: blocks.BlockFolder, number: int, *others: object) -> object:
        if number == 3:
            raise KeyboardInterrupt
        return write(self, number, *others)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("--raw")
    training, _, lines, _ = prepare("--raw")
    assert "data/train.json: continuing behind 6 articles that an interrupted run has tokenised" in lines
    assert tokens(training) == encoded(tokenizer, articles)
