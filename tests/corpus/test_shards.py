import json
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import build_shards, load_shards, read_index, shards
from reformer_lm.errors import InputError
from reformer_lm.text import encode_article, load_tokenizer, tokenizer_fingerprint

ARTICLES = ["春天。", "山有花", "我不在\n你在", "一二三四五六七八九十" * 5, "雪", "风月"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_pieces", [1, 2, 4, 6, 100])
def test_round_trip(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, num_pieces: int) -> None:
    folder = tmp_path / "new" / "tokens"
    index = build_shards(iter(ARTICLES), tokenizer, folder, num_pieces)
    expected = [encode_article(tokenizer, article) for article in ARTICLES]
    assert index.num_articles == len(ARTICLES)
    assert index.num_tokens == sum(map(len, expected))
    assert len(index.shards) == min(num_pieces, len(ARTICLES))
    assert index == read_index(folder)

    stream = load_shards(folder, tokenizer_fingerprint(tokenizer))
    tokens = stream.read(0, len(stream))
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(chain.from_iterable(expected))
    assert stream.num_articles == len(ARTICLES)
    starts = [stream.article_start(number) for number in range(len(ARTICLES))]
    assert starts == [sum(map(len, expected[:number])) for number in range(len(ARTICLES))]
    with pytest.raises(IndexError):
        stream.article_start(len(ARTICLES))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    characters = [chr(code) for code in range(0x20000, 0x20000 + 66_000)]
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), encoding="utf-8")
    tokenizer = load_tokenizer(vocabulary)
    build_shards([characters[-1] + characters[0]], tokenizer, tmp_path / "tokens", 1)
    stream = load_shards(tmp_path / "tokens", tokenizer_fingerprint(tokenizer))
    assert stream.read(0, 4).tolist() == [4, 66_004, 5, 2]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 50))
def test_shards_are_cut_between_articles_and_never_empty(lengths: list[int], num_pieces: int) -> None:
    boundaries = shards._shard_boundaries(np.array(lengths), num_pieces)
    assert boundaries[0] == 0
    assert boundaries[-1] == len(lengths)
    assert len(boundaries) == min(num_pieces, len(lengths)) + 1
    assert all(np.diff(boundaries) >= 1)


def test_shards_have_about_equal_numbers_of_tokens() -> None:
    lengths = np.array([5, 1, 1, 1, 1, 1, 10, 10, 5, 5] * 10)
    boundaries = shards._shard_boundaries(lengths, 4)
    sizes = [lengths[first:last].sum() for first, last in pairwise(boundaries)]
    assert max(sizes) - min(sizes) <= 20


def test_short_and_blank_articles_are_dropped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    index = build_shards(["春天", "春天山", "  \n  ", "", "春天山水"], tokenizer, tmp_path / "tokens", 1, 2)
    assert (index.num_articles, index.num_dropped, index.min_length) == (2, 3, 2)
    assert index.num_tokens == 3 + 4 + 2 * 2
    with pytest.raises(InputError, match=r"none of the 2 articles has more than 2 characters.*--min_length"):
        build_shards(["春天", ""], tokenizer, tmp_path / "tokens", 1, 2)
    # A corpus that cannot be used leaves the shards of the last one alone.
    assert read_index(tmp_path / "tokens") == index


def test_unknown_tokens_are_counted_and_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    index = build_shards(["龘天龘地", "靐"], tokenizer, tmp_path / "tokens", 1)
    assert index.num_unknown == 3
    assert index.unknown_share == 3 / 9
    assert index.unknown_characters == (("龘", 2), ("靐", 1))
    assert read_index(tmp_path / "tokens").unknown_message(tokenizer).count("龘") == 1
    assert build_shards(["天地"], tokenizer, tmp_path / "tokens", 1).unknown_message(tokenizer) == ""


def test_batches_of_articles_are_bounded_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 5)
    monkeypatch.setattr(shards, "COPY_TOKENS", 3)
    sizes = []
    encode = shards.encode_articles
    monkeypatch.setattr(shards, "encode_articles", lambda t, batch: sizes.append(len(batch)) or encode(t, batch))
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 2)
    assert sizes == [2, 1, 1, 2]
    stream = load_shards(tmp_path / "tokens", tokenizer_fingerprint(tokenizer))
    assert stream.read(0, len(stream)).tolist() == [id_ for a in ARTICLES for id_ in encode_article(tokenizer, a)]


@pytest.mark.parametrize("name", ["tokens-00001.bin", "articles-00000.bin"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "corrupt", "missing"])
def test_damaged_shards_are_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, damage: str
) -> None:
    folder = tmp_path / "tokens"
    build_shards(ARTICLES, tokenizer, folder, 2)
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        changed = {"truncated": content[:-1], "longer": content + b"\0", "corrupt": content[:-1] + b"\x7f"}
        (folder / name).write_bytes(changed[damage])
    with pytest.raises(InputError, match=rf"{name}.*run again with --raw") as error:
        load_shards(folder, tokenizer_fingerprint(tokenizer))
    assert "\n" not in str(error.value)


def test_other_tokenizer_and_missing_index_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 1)
    with pytest.raises(InputError, match=r"another tokenizer.*--raw"):
        load_shards(tmp_path / "tokens", "0" * 64)
    with pytest.raises(InputError, match=r"no token shards here.*--raw"):
        load_shards(tmp_path / "nowhere", tokenizer_fingerprint(tokenizer))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no token shards here.*--raw"):
        read_index(tmp_path / "file")


@pytest.mark.parametrize("change", ["cut", "not an object", "unknown field", "version", "no shards"])
def test_damaged_index_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, change: str) -> None:
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 1)
    path = tmp_path / "tokens" / "index.json"
    fields = json.loads(path.read_text())
    changed = {
        "cut": path.read_text()[:-5],
        "not an object": "[]",
        "unknown field": json.dumps({**fields, "color": 1}),
        "version": json.dumps({**fields, "version": 99}),
        "no shards": json.dumps({**fields, "shards": 3}),
    }
    path.write_text(changed[change])
    with pytest.raises(InputError, match=r"index.json.*--raw"):
        read_index(tmp_path / "tokens")


def test_a_failed_build_leaves_the_earlier_shards_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "tokens"
    build_shards(ARTICLES, tokenizer, folder, 2)
    before = files_of(folder)

    def failing() -> Iterator[str]:
        yield "春天"
        raise InputError("broken in the middle")

    with pytest.raises(InputError, match="broken in the middle"):
        build_shards(failing(), tokenizer, folder, 2)
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "tokens.partial" / "all.bin").write_bytes(b"half")
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert sorted(files_of(tmp_path / "tokens")) == ["articles-00000.bin", "index.json", "tokens-00000.bin"]


def test_fewer_pieces_leave_none_of_the_earlier_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 4)
    build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 1)
    assert sorted(files_of(tmp_path / "tokens")) == ["articles-00000.bin", "index.json", "tokens-00000.bin"]


def test_folders_of_other_things_are_never_deleted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'diary.txt'.*--tokenized_data_path"):
        build_shards(ARTICLES, tokenizer, tmp_path, 1)
    with pytest.raises(InputError, match="this is a file"):
        build_shards(ARTICLES, tokenizer, tmp_path / "diary.txt", 1)
    assert (tmp_path / "diary.txt").read_text() == "dear"


def test_folder_that_cannot_be_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written.*--tokenized_data_path"):
        build_shards(ARTICLES, tokenizer, tmp_path / "file" / "tokens", 1)
    with pytest.raises(InputError, match="at least 1 shard"):
        build_shards(ARTICLES, tokenizer, tmp_path / "tokens", 0)
