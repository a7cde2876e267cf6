import os
from pathlib import Path

import numpy as np
import pytest

from reformer_lm.corpus import CorpusSource, Reading, find_files, fingerprint_source
from reformer_lm.corpus.sources import Place
from reformer_lm.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "b.txt": "b1\n\nb2",
        "a.txt": "a1",
        "deep/er/c.jsonl": '"c1"\n"c2"\n"c3"',
        "deep/d.JSON": '["d1"]',
        "deep/notes.md": "no corpus",
        ".hidden/e.txt": "e",
        "deep/.f.txt": "f",
        "[odd].txt": "odd",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["b.txt", "a.txt"], ["b.txt", "a.txt"]),
        (["."], ["[odd].txt", "a.txt", "b.txt", "deep/d.JSON", "deep/er/c.jsonl"]),
        (["deep"], ["deep/d.JSON", "deep/er/c.jsonl"]),
        (["*.txt"], ["[odd].txt", "a.txt", "b.txt"]),
        (["**/*.jsonl", "a*"], ["deep/er/c.jsonl", "a.txt"]),
        (["d*p"], ["deep/d.JSON", "deep/er/c.jsonl"]),
        (["b.txt", "*.txt", "./b.txt"], ["b.txt", "[odd].txt", "a.txt"]),
        (["[odd].txt"], ["[odd].txt"]),
    ],
)
def test_files_folders_and_patterns(folder: Path, paths: list[str], found: list[str]) -> None:
    assert [str(path) for path in find_files(paths)] == found
    assert find_files([str(folder / path) for path in paths]) == [folder / path for path in found]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a.txt", "missing.txt"], "missing.txt: no such file"),
        (["*.parquet"], r"\*.parquet: no file has such a name"),
        (["deep/er/c.jsonl", "empty"], "empty: no corpus file in this folder"),
        (["deep/notes.md"], "notes.md: unknown format '.md'"),
        (["deep/*"], "notes.md: unknown format"),
    ],
)
def test_what_is_not_found_is_said_in_one_line(folder: Path, paths: list[str], message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message) as error:
        CorpusSource(paths)
    assert "\n" not in str(error.value)


def test_articles_of_all_files_from_any_place_on(folder: Path) -> None:
    source = CorpusSource(["."])
    everything = list(source.articles())
    assert [article for _, article in everything] == ["odd", "a1", "b1", "b2", "d1", "c1", "c2", "c3"]
    for number, (place, _) in enumerate(everything, start=1):
        told: list[int] = []
        assert list(source.articles(place, told.append)) == everything[number:]
        assert sum(told) == source.size
    assert everything[-1][0] == Place(4, 3)


def test_files_before_the_place_are_not_opened(folder: Path) -> None:
    source = CorpusSource(["."])
    (folder / "a.txt").write_bytes(b"\xff")
    assert [article for _, article in source.articles(Place(2, 1))] == ["b2", "d1", "c1", "c2", "c3"]
    with pytest.raises(InputError, match="invalid UTF-8"):
        list(source.articles())


def test_an_empty_file_among_others_is_no_mistake(folder: Path) -> None:
    (folder / "a.txt").write_text("")
    assert [article for _, article in CorpusSource(["a.txt", "b.txt"]).articles()] == ["b1", "b2"]


def test_token_ids_need_a_beginning(folder: Path) -> None:
    np.savez_compressed("a.npz", np.array([1, 2]))
    with pytest.raises(InputError, match="holds token ids"):
        list(CorpusSource(["a.npz"]).articles())
    assert [ids.tolist() for _, ids in CorpusSource(["a.npz"], begin_id=4).articles()] == [[1, 2]]


def test_a_description_fits_the_same_bytes_only(folder: Path) -> None:
    described = fingerprint_source("a.txt")
    assert described.describes("a.txt")
    os.utime("a.txt", (1, 1))
    assert described.describes("a.txt")
    Path("copy.txt").write_text("a1", encoding="utf-8")
    assert described.describes("copy.txt")
    Path("a.txt").write_text("a2", encoding="utf-8")
    assert not described.describes("a.txt")
    # The same size and time, but another file.
    os.utime("copy.txt", ns=(described.modified_ns, described.modified_ns))
    Path("copy.txt").write_text("zz", encoding="utf-8")
    os.utime("copy.txt", ns=(described.modified_ns, described.modified_ns))
    assert not described.describes("copy.txt")
    with pytest.raises(InputError, match="no such file"):
        described.describes("missing.txt")


def test_the_reading_reaches_the_files(folder: Path) -> None:
    Path("a.txt").write_bytes("春\n天".encode("gb18030"))
    source = CorpusSource(["a.txt"], Reading(txt_articles="line", encoding="gb18030"))
    assert [article for _, article in source.articles()] == ["春", "天"]
