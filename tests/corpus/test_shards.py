import json
import random
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import CorpusSource, blocks, build_shards, load_shards, read_index
from reformer_lm.errors import InputError
from reformer_lm.text import encode_article, load_tokenizer, tokenizer_fingerprint

CHARACTERS = "春夏秋冬天地山水风花雪月人有大小上下一二三四五六七八九十，。！？的了是不在我你他"
SourceOf = Callable[[Sequence[str]], CorpusSource]
ARTICLES = ["春天。", "山有花", "我不在\n你在", "一二三四五六七八九十" * 5, "雪", "风月"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_pieces", [1, 2, 4, 6, 100])
def test_round_trip(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, num_pieces: int, source_of: SourceOf) -> None:
    folder = tmp_path / "new" / "tokens"
    index = build_shards(source_of(ARTICLES), tokenizer, folder, num_pieces)
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


def test_large_vocabularies_take_four_bytes(tmp_path: Path, source_of: SourceOf) -> None:
    vocabulary = tmp_path / "vocab.txt"
    characters = [chr(code) for code in range(0x20000, 0x20000 + 66_000)]
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), encoding="utf-8")
    tokenizer = load_tokenizer(vocabulary)
    build_shards(source_of([characters[-1] + characters[0]]), tokenizer, tmp_path / "tokens", 1)
    stream = load_shards(tmp_path / "tokens", tokenizer_fingerprint(tokenizer))
    assert stream.read(0, 4).tolist() == [4, 66_004, 5, 2]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    num_pieces=st.integers(1, 50),
    block=st.integers(1, 200),
)
def test_shards_are_cut_between_articles_and_about_equal(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    lengths: list[int],
    num_pieces: int,
    block: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.json").write_text(json.dumps(["春" * length for length in lengths]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CHARACTERS", block)
        index = build_shards(CorpusSource([folder / "a.json"]), tokenizer, folder / "tokens", num_pieces)
    sizes = np.array(lengths) + 2
    # The slow way: each piece ends at the last article that is whole before its share, but none is empty.
    ends, boundaries = np.cumsum(sizes), [0]
    pieces = min(num_pieces, len(lengths))
    for piece in range(1, pieces):
        wanted = int(np.searchsorted(ends, ends[-1] * piece / pieces, side="right"))
        boundaries.append(min(max(wanted, boundaries[-1] + 1), len(lengths) - (pieces - piece)))
    expected = [part.sum() for part in np.split(sizes, boundaries[1:])]
    assert [shard.num_tokens for shard in index.shards] == expected
    stream = load_shards(folder / "tokens", tokenizer_fingerprint(tokenizer))
    assert [stream.article_start(number) for number in range(len(lengths))] == (ends - sizes).tolist()
    assert stream.all_article_starts().tolist() == (ends - sizes).tolist()


def test_short_and_blank_articles_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    index = build_shards(source_of(["春天", "春天山", "  \n  ", "", "春天山水"]), tokenizer, tmp_path / "tokens", 1, 2)
    assert (index.num_articles, index.num_dropped, index.min_length) == (2, 3, 2)
    assert index.num_tokens == 3 + 4 + 2 * 2
    with pytest.raises(InputError, match=r"none of the 2 articles has more than 2 characters.*--min_length"):
        build_shards(source_of(["春天", ""]), tokenizer, tmp_path / "tokens", 1, 2)
    # A corpus that cannot be used leaves the shards of the last one alone.
    assert read_index(tmp_path / "tokens") == index


def test_unknown_tokens_are_counted_and_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    index = build_shards(source_of(["龘天龘地", "靐"]), tokenizer, tmp_path / "tokens", 1)
    assert index.num_unknown == 3
    assert index.unknown_share == 3 / 9
    assert index.unknown_characters == (("龘", 2), ("靐", 1))
    assert read_index(tmp_path / "tokens").unknown_message(tokenizer).count("龘") == 1
    assert build_shards(source_of(["天地"]), tokenizer, tmp_path / "tokens", 1).unknown_message(tokenizer) == ""


@pytest.mark.parametrize("name", ["tokens-00001.bin", "articles-00000.bin", "hashes-00001.bin"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "corrupt", "missing"])
def test_damaged_shards_are_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, damage: str, source_of: SourceOf
) -> None:
    folder = tmp_path / "tokens"
    build_shards(source_of(ARTICLES), tokenizer, folder, 2)
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        changed = {"truncated": content[:-1], "longer": content + b"\0", "corrupt": content[:-1] + b"\x7f"}
        (folder / name).write_bytes(changed[damage])
    with pytest.raises(InputError, match=rf"{name}.*run again with --raw") as error:
        load_shards(folder, tokenizer_fingerprint(tokenizer))
    assert "\n" not in str(error.value)


def test_other_tokenizer_and_missing_index_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    build_shards(source_of(ARTICLES), tokenizer, tmp_path / "tokens", 1)
    with pytest.raises(InputError, match=r"another tokenizer.*--raw"):
        load_shards(tmp_path / "tokens", "0" * 64)
    with pytest.raises(InputError, match=r"no token shards here.*--raw"):
        load_shards(tmp_path / "nowhere", tokenizer_fingerprint(tokenizer))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no token shards here.*--raw"):
        read_index(tmp_path / "file")


@pytest.mark.parametrize("change", ["cut", "not an object", "unknown field", "version", "no shards"])
def test_damaged_index_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, change: str, source_of: SourceOf
) -> None:
    build_shards(source_of(ARTICLES), tokenizer, tmp_path / "tokens", 1)
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


def test_a_failed_build_leaves_the_earlier_shards_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    folder = tmp_path / "tokens"
    build_shards(source_of(ARTICLES), tokenizer, folder, 2)
    before = files_of(folder)
    broken = source_of(["春天", "山水"])
    broken.files[0].write_text('["春天", "山水", 3]', encoding="utf-8")
    with pytest.raises(InputError, match="element 3 is a number"):
        build_shards(broken, tokenizer, folder, 2)
    assert files_of(folder) == before
    build_shards(source_of(ARTICLES), tokenizer, folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_fewer_pieces_leave_none_of_the_earlier_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    build_shards(source_of(ARTICLES), tokenizer, tmp_path / "tokens", 4)
    build_shards(source_of(ARTICLES), tokenizer, tmp_path / "tokens", 1)
    assert sorted(files_of(tmp_path / "tokens")) == [
        "articles-00000.bin",
        "hashes-00000.bin",
        "index.json",
        "tokens-00000.bin",
    ]


def test_folders_of_other_things_are_never_deleted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'diary.txt'.*--tokenized_data_path"):
        build_shards(source_of(ARTICLES), tokenizer, tmp_path, 1)
    with pytest.raises(InputError, match="this is a file"):
        build_shards(source_of(ARTICLES), tokenizer, tmp_path / "diary.txt", 1)
    assert (tmp_path / "diary.txt").read_text() == "dear"


def test_folder_that_cannot_be_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written.*--tokenized_data_path"):
        build_shards(source_of(ARTICLES), tokenizer, tmp_path / "file" / "tokens", 1)
    with pytest.raises(InputError, match="at least 1 shard"):
        build_shards(source_of(ARTICLES), tokenizer, tmp_path / "tokens", 0)


def test_a_split_goes_by_the_text_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    dice = random.Random(0)
    articles = ["".join(dice.choices(CHARACTERS, k=8)) for _ in range(299)]
    sides: list[set[tuple[int, ...]]] = []

    def articles_in(folder: Path) -> list[tuple[int, ...]]:
        stream = load_shards(folder, tokenizer_fingerprint(tokenizer))
        ends = [*stream.all_article_starts().tolist(), len(stream)]
        return [tuple(stream.read(first, last).tolist()) for first, last in zip(ends[:-1], ends[1:], strict=True)]

    for number, order in enumerate((articles, articles[::-1], articles * 2, [f" {a}\n" for a in articles])):
        folder, held_out = tmp_path / f"{number}", tmp_path / f"{number}-validation"
        index = build_shards(source_of(order), tokenizer, folder, 3, val_split=0.2, validation_directory=held_out)
        validation = read_index(held_out)
        assert (index.is_validation, validation.is_validation) == (False, True)
        assert len(index.shards) == 3
        assert len(validation.shards) == 1
        assert index.num_articles + validation.num_articles == len(order)
        assert index.identity != validation.identity
        training_articles, held_out_articles = articles_in(folder), articles_in(held_out)
        if number < 3:
            assert not set(training_articles) & set(held_out_articles)
            sides.append(set(held_out_articles))
            kept = [a for a in order if tuple(encode_article(tokenizer, a)) not in sides[0]]
            assert training_articles == [tuple(encode_article(tokenizer, a)) for a in kept]
    assert sides[0] == sides[1] == sides[2]
    assert 0.1 < len(sides[0]) / 299 < 0.3
    # More is more of the same.
    build_shards(
        source_of(articles), tokenizer, tmp_path / "more", 1, val_split=0.4, validation_directory=tmp_path / "more-v"
    )
    assert sides[0] < set(articles_in(tmp_path / "more-v"))


def test_a_split_that_leaves_a_side_empty_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    for share, side in ((1e-9, "validation"), (1 - 1e-9, "training")):
        with pytest.raises(InputError, match=rf"--val_split \S+ leaves none of the 6 articles to {side}"):
            build_shards(
                source_of(ARTICLES), tokenizer, tmp_path / "t", 1, val_split=share, validation_directory=tmp_path / "v"
            )


def test_unknown_characters_are_counted_on_their_side(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    articles = [f"天{chr(0x9F98 + number)}" for number in range(40)]
    index = build_shards(
        source_of(articles), tokenizer, tmp_path / "t", 1, val_split=0.5, validation_directory=tmp_path / "v"
    )
    validation = read_index(tmp_path / "v")
    assert index.num_unknown == index.num_articles
    assert validation.num_unknown == validation.num_articles == 40 - index.num_articles
    assert not dict(index.unknown_characters).keys() & dict(validation.unknown_characters).keys()


def test_token_ids_become_shards(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf) -> None:
    encoded = [np.array(encode_article(tokenizer, article)) for article in ARTICLES]
    np.savez_compressed(tmp_path / "a.npz", *encoded)
    np.savez_compressed(tmp_path / "b.npz", *(ids[1:-1] for ids in encoded))
    build_shards(source_of(ARTICLES), tokenizer, tmp_path / "text", 2)
    expected = files_of(tmp_path / "text")
    for name in ("a.npz", "b.npz"):
        source = CorpusSource([tmp_path / name], begin_id=tokenizer.bos_token_id)
        build_shards(source, tokenizer, tmp_path / "tokens", 2)
        found = files_of(tmp_path / "tokens")
        # Even the hashes, for nothing in these texts is unknown.
        assert {name for name in found if found[name] != expected[name]} == {"index.json"}
    np.savez_compressed(tmp_path / "a.npz", encoded[0], np.array([5, len(tokenizer)]))
    source = CorpusSource([tmp_path / "a.npz"], begin_id=tokenizer.bos_token_id)
    with pytest.raises(
        InputError, match=rf"a.npz: article 2 has the token id {len(tokenizer)}, but .*--tokenizer_path"
    ):
        build_shards(source, tokenizer, tmp_path / "tokens", 2)
    np.savez_compressed(tmp_path / "a.npz", np.array([5, -1]))
    with pytest.raises(InputError, match="has the token id -1"):
        build_shards(
            CorpusSource([tmp_path / "a.npz"], begin_id=tokenizer.bos_token_id), tokenizer, tmp_path / "tokens", 2
        )


def test_texts_and_token_ids_in_one_corpus(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("春天龘\n\n山水", encoding="utf-8")
    np.savez_compressed(tmp_path / "b.npz", np.array(encode_article(tokenizer, "风花")))
    (tmp_path / "c.txt").write_text("雪月龘", encoding="utf-8")
    source = CorpusSource([tmp_path], begin_id=tokenizer.bos_token_id)
    index = build_shards(source, tokenizer, tmp_path / "tokens", 1)
    stream = load_shards(tmp_path / "tokens", tokenizer_fingerprint(tokenizer))
    expected = [encode_article(tokenizer, text) for text in ("春天龘", "山水", "风花", "雪月龘")]
    assert stream.read(0, len(stream)).tolist() == list(chain.from_iterable(expected))
    assert index.unknown_characters == (("龘", 2),)
