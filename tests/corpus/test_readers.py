import hashlib
import json
from pathlib import Path

import pytest

from reformer_lm.corpus import fingerprint_source, read_articles
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
        ("a.json", b'["a", "b", 3.5]', ["element 3 of 3 is a number"]),
        ("a.json", b'["a", {"text": "b"}]', ["element 2 of 2 is an object"]),
        ("a.json", b'[["a"]]', ["element 1 of 1 is an array"]),
        ("a.json", b"[true]", ["element 1 of 1 is true or false"]),
        ("a.json", b"[" * 100_000, ["nested too deeply"]),
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
        ("a.csv", b"a", ["unknown format '.csv'", ".jsonl"]),
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
