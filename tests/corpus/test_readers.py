import gzip
import hashlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.corpus import Reading, files, fingerprint_source, read_articles
from reformer_lm.errors import InputError

ARTICLES = ["春天来了。\n花开了。", "", "second"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_json_array_of_strings(tmp_path: Path, mark: bytes, ensure_ascii: bool) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(mark + json.dumps(ARTICLES, ensure_ascii=ensure_ascii).encode())
    assert list(read_articles(path)) == ARTICLES


def test_json_lines_hold_objects_or_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\ntwo", "source": 3}\r\n\n"three"\n')
    assert list(read_articles(path)) == ["one\ntwo", "three"]


def test_text_has_articles_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n\n一\r\n二\r\n \t\r\n\n三\u2028四".encode())
    assert list(read_articles(path)) == ["一\n二", "三\u2028四"]


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.json", b'["a",\n "b" "c"]', ["line 2 column 6"]),
        ("a.json", b'["a", ', ["line 1 column 7"]),
        ("a.json", b"  \n", ["the file is empty"]),
        ("a.json", b'{"text": "a"}', ["the JSON is an object", "list of strings"]),
        ("a.json", b"null", ["the JSON is null"]),
        ("a.json", b'["a", "b", 3.5]', ["element 3 is a number"]),
        ("a.json", b'["a", {"text": "b"}]', ["element 2 is an object"]),
        ("a.json", b'[["a"]]', ["element 1 is an array"]),
        ("a.json", b"[true]", ["element 1 is true or false"]),
        ("a.json", b"[" * 100_000, ["element 1 is an array"]),
        ("a.json", b"[1" + b"1" * 6000 + b"]", ["element 1 is a number"]),
        ("a.json", b'["a", ]', ["line 1 column 7: Expecting value"]),
        ("a.json", b'["a"] "b"', ["line 1 column 7: Extra data"]),
        ("a.json", b'["a",\n"b\\q"]', ["line 2 column 3"]),
        ("a.json", b'["a",\n\n "b', ["line 3 column 2: Unterminated string"]),
        ("a.json", b'["a\\u12', ["line 1 column 5"]),
        ("a.json", b"[nul]", ["line 1 column 2: Expecting value"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "nested too deeply"]),
        ("a.json", b"[]", ["empty"]),
        ("a.json", b'["", " \\n"]', ["empty"]),
        ("a.json", b'["abc\xff"]', ["invalid UTF-8 at byte 5 (0xff)"]),
        ("a.json", b'\xef\xbb\xbf["abc\xff"]', ["invalid UTF-8 at byte 8 (0xff)"]),
        ("a.json", "春天".encode("gb18030"), ["invalid UTF-8 at byte 0", "iconv"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', ["line 2 column 10"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', ["line 3 is an object without a string 'text'"]),
        ("a.jsonl", b"7\n", ["line 1 is a number"]),
        ("a.jsonl", b"\n", ["empty"]),
        ("a.jsonl", b'"a"\n"b\xe6"\n', ["invalid UTF-8 at byte 6 (0xe6)"]),
        ("a.txt", b" \n\n", ["empty"]),
        ("a.txt", b"abc\n\nd\x80", ["invalid UTF-8 at byte 6 (0x80)"]),
        ("a.json.gz", b"abc", ["the gzip file is damaged"]),
        ("a.txt.gz", gzip.compress("春天".encode() * 99, mtime=0)[:-9], ["the gzip file is damaged"]),
        ("a.json.gz", gzip.compress(b'["a", 3]', mtime=0), ["element 2 is a number"]),
        ("a.csv", b"a", ["unknown format '.csv'", ".jsonl"]),
        ("a.csv.gz", b"a", ["unknown format '.gz'", ".jsonl"]),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, fragments: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_articles(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(fragment in message for fragment in fragments), message


# Everything that could be cut in two at the end of a chunk.
AWKWARD = st.text(st.sampled_from('春a"\\\n\r\t\u2028\u0085😀é,[]{}丂'), max_size=12)


@given(
    articles=st.lists(AWKWARD, max_size=6), chunk=st.integers(1, 12), ensure_ascii=st.booleans(), indented=st.booleans()
)
def test_json_is_read_alike_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, articles: list[str], chunk: int, ensure_ascii: bool, indented: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    articles = [*articles, "x"]
    text = json.dumps(articles, ensure_ascii=ensure_ascii, indent=1 if indented else None)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        assert list(read_articles(path)) == articles
        # Whatever is wrong is found at the same place as in one piece.
        broken = text[: len(text) // 2] + text[len(text) // 2 + 1 :]
        path.write_bytes(broken.encode())
        outcomes = []
        for size in (chunk, 1 << 20):
            patch.setattr(files, "CHUNK_BYTES", size)
            try:
                outcomes.append(str(list(read_articles(path))))
            except InputError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        try:
            without_text = "no article with any text" in outcomes[0]
            assert without_text or outcomes[0] == str(json.loads(broken))
        except json.JSONDecodeError as error:
            # The module reads to the end; here an element of the wrong kind is met first.
            where = f"line {error.lineno} column {error.colno}: {error.msg}"
            assert where in outcomes[0] or " is " in outcomes[0]


@given(
    articles=st.lists(
        st.text(st.sampled_from("春a \u2028😀丂\u3000"), min_size=1, max_size=9).filter(str.strip), min_size=1
    ),
    chunk=st.integers(1, 9),
    encoding=st.sampled_from(files.ENCODINGS),
    mark=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    kind=st.sampled_from(["line", "blank", "file", "jsonl"]),
    packed=st.booleans(),
)
def test_lines_are_read_alike_in_pieces_of_any_size_and_encoding(
    tmp_path_factory: pytest.TempPathFactory,
    articles: list[str],
    chunk: int,
    encoding: str,
    mark: bool,
    newline: str,
    kind: str,
    packed: bool,
) -> None:
    separator = newline * 2 if kind == "blank" else newline
    content = (
        [json.dumps({"body": article}, ensure_ascii=False) for article in articles] if kind == "jsonl" else articles
    )
    data = (("\ufeff" if mark else "") + separator.join(content) + newline).encode(encoding)
    name = ("a.jsonl" if kind == "jsonl" else "a.txt") + (".GZ" if packed else "")
    path = tmp_path_factory.mktemp("lines") / name
    path.write_bytes(gzip.compress(data) if packed else data)
    reading = Reading("body", "blank" if kind == "jsonl" else kind, encoding)
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        found = list(read_articles(path, reading, told.append))
    assert found == (["".join(separator.join(articles))] if kind == "file" else articles)
    assert sum(told) == path.stat().st_size


def test_other_encodings_are_named_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("春丂".encode("gb18030")[:-1])
    with pytest.raises(InputError, match=r"invalid GB18030 at byte 2 \(0x81\); leave --encoding"):
        list(read_articles(path, Reading(encoding="gb18030")))


def test_a_named_field_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n"c"\n{"text": "d"}', encoding="utf-8")
    articles = read_articles(path, Reading(text_field="body"))
    assert [next(articles), next(articles)] == ["b", "c"]
    with pytest.raises(InputError, match=r"line 3 is an object without a string 'body'.*--text_field"):
        next(articles)


def test_a_json_array_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    # The mistake is a hundred chunks behind the first article, so that a reader that parsed all would meet it.
    path.write_text(json.dumps(["a" * files.CHUNK_BYTES] * 100) + "]", encoding="utf-8")
    articles = read_articles(path)
    assert len(next(articles)) == files.CHUNK_BYTES
    with pytest.raises(InputError, match="Extra data"):
        list(articles)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    articles = [f"第{number}篇\n春天" for number in range(1000)]
    table = arrow.table({"id": list(range(1000)), "body": articles, "kind": arrow.array(articles).dictionary_encode()})
    parquet.write_table(table, path, row_group_size=300)
    told: list[int] = []
    assert list(read_articles(path, Reading(text_field="body"), told.append)) == articles
    assert sum(told) == path.stat().st_size
    assert list(read_articles(path, Reading(text_field="kind"))) == articles
    with pytest.raises(InputError, match=r"no column 'text' but id, body, kind; .*--text_field"):
        list(read_articles(path))
    with pytest.raises(InputError, match=r"column 'id' holds int64, not text"):
        list(read_articles(path, Reading(text_field="id")))
    parquet.write_table(arrow.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2 has no 'text'"):
        list(read_articles(path))
    content = path.read_bytes()
    for damaged in (b"abc", content[:-20], content[:8] + b"\xff" * 30 + content[38:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a.parquet: .*write it anew") as error:
            list(read_articles(path))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read_articles(tmp_path / "missing.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow.*pip install pyarrow"):
        read_articles(tmp_path / "a.parquet")


def test_missing_file_and_folder_are_found_before_the_first_article(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_articles(tmp_path / "missing.json")
    with pytest.raises(InputError, match="no such file"):
        read_articles(tmp_path / "missing.csv")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="a folder"):
        read_articles(tmp_path / "folder.json")
    with pytest.raises(InputError, match="no such file"):
        fingerprint_source(tmp_path / "missing.json")


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'["a"]')
    first = fingerprint_source(path)
    assert first.size == 5
    assert first.sha256 == hashlib.sha256(b'["a"]').hexdigest()
    path.write_bytes(b'["b"]')
    assert fingerprint_source(path).sha256 != first.sha256


def test_a_line_of_json_that_is_cut_off_is_reported_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "甲"}\n{"text": "乙"\n{"text": "丙"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2 column"):
        list(read_articles(path))
