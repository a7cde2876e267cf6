"""Loading, saving, special tokens, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from reformer_lm.errors import InputError
from reformer_lm.text import (
    UnknownCounter,
    encode_article,
    encode_articles,
    load_tokenizer,
    normalize_text,
    tokenizer_fingerprint,
)

SAMPLES = [
    "你好，world. a.b a. b",
    "第一行\n\n第三行\n",
    "[MASK]你好[SEP]再见[CLS]",
    "Hello, C++ 和 3.14！㐱㐲",
    "# ## ###x",
]


def test_conventions(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[MASK]", "[CLS]")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("[PAD]", "[UNK]")
    assert sorted(tokenizer.all_special_tokens) == ["[CLS]", "[MASK]", "[PAD]", "[UNK]"]
    assert tokenizer.padding_side == "left"
    newline = tokenizer.convert_tokens_to_ids("[SEP]")
    assert tokenizer.encode("你\n\n好")[1:3] == [newline, newline]
    assert encode_article(tokenizer, "") == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = "你好\n我们"
    article = encode_article(tokenizer, text)
    assert article == [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    assert tokenizer.decode(article, skip_special_tokens=True) == text
    assert tokenizer.decode(article) == f"[MASK]{text}[CLS]"
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_a_call_gives_ids_and_mask_padded_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["，。", "，"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id


def test_literal_special_tokens_in_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "[MASK][CLS][PAD][UNK][SEP]"
    ids = tokenizer.encode(text)
    assert not set(ids) & {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("[SEP]")}
    assert tokenizer.decode(ids) == text.lower()
    assert encode_articles(tokenizer, [text])[0][1:-1] == ids


def test_articles_in_a_batch_are_what_they_are_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = [encode_article(tokenizer, text) for text in SAMPLES]
    # An earlier call's padding and truncation must not reach the articles.
    tokenizer(SAMPLES, padding=True, truncation=True, max_length=3)
    assert encode_articles(tokenizer, SAMPLES) == expected
    assert encode_articles(tokenizer, []) == []


def test_lone_surrogates_are_unknown_characters(default_tokenizer: PreTrainedTokenizerFast) -> None:
    unknown = default_tokenizer.unk_token_id
    assert encode_article(default_tokenizer, "你\ud800")[2:3] == [unknown]
    assert encode_articles(default_tokenizer, ["你\ud83d\ude00", "好"])[0][2:3] == [unknown]


@pytest.mark.parametrize("kind", ["default", "keep_case", "bert_like", "bpe", "words"])
def test_other_processes_agree_without_this_package(
    kind: str, tokenizer_of_kind: Callable[[str], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of_kind(kind)
    tokenizer.save_pretrained(tmp_path)
    # As in a saved run: the model's config is there too, of a type that only this package knows.
    (tmp_path / "config.json").write_text('{"model_type": "reformer_lm"}')
    code = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "folder, samples = json.loads(sys.stdin.read())\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "assert not any(name.startswith('reformer_lm') for name in sys.modules)\n"
        "ids = [tokenizer.encode(sample) for sample in samples]\n"
        "print(json.dumps({'ids': ids,\n"
        "    'texts': [tokenizer.decode(one) for one in ids],\n"
        "    'batch': {**tokenizer(samples, padding=True)},\n"
        "    'special': [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,\n"
        "                tokenizer.unk_token_id, sorted(tokenizer.all_special_ids)]}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([str(tmp_path), SAMPLES]),
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    ids = [tokenizer.encode(sample) for sample in SAMPLES]
    assert json.loads(done.stdout) == {
        "ids": ids,
        "texts": [tokenizer.decode(one) for one in ids],
        "batch": {**tokenizer(SAMPLES, padding=True)},
        "special": [
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
            sorted(tokenizer.all_special_ids),
        ],
    }


def test_saving_and_loading_keeps_the_fingerprint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert len(bytes.fromhex(fingerprint)) == 32
    tokenizer(SAMPLES, padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    tokenizer.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert tokenizer_fingerprint(again) == fingerprint
        assert encode_articles(again, SAMPLES) == encode_articles(tokenizer, SAMPLES)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint


def test_fingerprints_differ_where_ids_may(
    tokenizer_of_kind: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    kinds = ["default", "keep_case", "bert_like", "bpe", "bpe_keep_case", "words"]
    assert len({tokenizer_fingerprint(tokenizer_of_kind(kind)) for kind in kinds}) == len(kinds)


def test_ids_are_lines_wherever_the_special_tokens_stand(bert_like_vocabulary: Path) -> None:
    lines = bert_like_vocabulary.read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(bert_like_vocabulary)
    assert len(tokenizer) == len(lines)
    assert all(tokenizer.convert_tokens_to_ids(line) == index for index, line in enumerate(lines))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 3)
    assert tokenizer.encode("\n") == [0]


def test_a_vocabulary_without_glued_punctuation_splits_it_off(bert_like_vocabulary: Path) -> None:
    tokenizer = load_tokenizer(bert_like_vocabulary)
    assert tokenizer.tokenize("Hello, world.going 你好") == [
        *("hello", ",", "wor", "##ld", ".", "g", "##o", "##ing", "你", "好"),
    ]
    assert tokenizer.decode(tokenizer.encode("hello , world . x y")) == "hello,world.x y"
    # Known with and without ##, so that it is part of words; α has no ## piece and stands alone.
    assert tokenizer.tokenize("né é αn") == ["n", "##é", "é", "α", "n"]
    assert normalize_text(tokenizer, "né é α n") == "né éαn"


def test_a_folder_saved_by_bert_tokenizer_is_rebuilt(bert_like_vocabulary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_bytes(bert_like_vocabulary.read_bytes())
    from_lines = load_tokenizer(folder)
    bert = BertTokenizer.from_pretrained(folder)
    saved = tmp_path / "saved"
    bert.save_pretrained(saved)
    assert not (saved / "vocab.txt").exists()
    tokenizer = load_tokenizer(saved)
    assert tokenizer.get_vocab() == from_lines.get_vocab()
    assert encode_articles(tokenizer, SAMPLES) == encode_articles(from_lines, SAMPLES)
    assert tokenizer.decode(tokenizer.encode("你好\n中国")) == "你好\n中国"


def test_a_hub_name_is_fetched_and_rebuilt(
    bert_like_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vocab.txt").write_bytes(bert_like_vocabulary.read_bytes())
    bert = BertTokenizer.from_pretrained(tmp_path)
    asked = []

    def fetch(name: str) -> BertTokenizer:
        asked.append(name)
        return bert

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fetch)
    tokenizer = load_tokenizer("someone/bert-chinese")
    assert asked == ["someone/bert-chinese"]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(bert_like_vocabulary))


def test_a_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"We couldn't connect to reach {name}.\nCheck your internet connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(InputError, match="no file or folder bert-base-chinese.*couldn't connect") as caught:
        load_tokenizer("bert-base-chinese")
    assert "\n" not in str(caught.value)
    assert "vocab.txt" in str(caught.value)


SPECIAL = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n啊\n".encode(), r"lacks \[MASK\]"),
        ((SPECIAL + "a\nb\na\n").encode(), "'a' twice, on lines 6 and 8"),
        ((SPECIAL + "a\n\nb\n").encode(), "empty line 7"),
        (SPECIAL.encode() + b"\xff\n", "not UTF-8: invalid byte at offset 31"),
    ],
)
def test_a_bad_vocabulary_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_order_mark_crlf_and_a_missing_last_line_end_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (SPECIAL + "啊\n\u2028\na").replace("\n", "\r\n").encode())
    tokenizer = load_tokenizer(path)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "啊", "\u2028", "a"]) == [0, 5, 6, 7]


def test_bad_tokenizer_files_are_one_clear_error(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    foreign_ids = {token: index for index, token in enumerate(SPECIAL.split())}
    gap = Tokenizer(models.WordPiece({**foreign_ids, "啊": 9}, unk_token="[UNK]"))
    cases: list[tuple[bytes, str]] = [
        (b"{", "not a tokenizer.json"),
        (b"\xff", "not UTF-8: invalid byte at offset 0"),
        (Tokenizer(models.BPE()).to_str().encode(), r"lacks \[PAD\]"),
        (Tokenizer(models.WordLevel(foreign_ids, "[UNK]")).to_str().encode(), "did not build"),
        (gap.to_str().encode(), "without gaps"),
    ]
    for content, message in cases:
        broken.write_bytes(content)
        for path in (broken, tmp_path):
            with pytest.raises(InputError, match=message) as caught:
                load_tokenizer(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "no such folder", "a/b/c", "tokenizer.json"])
def test_a_missing_file_is_not_looked_up_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> None:
        raise AssertionError(f"{name} was looked up")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no tokenizer file or folder"):
        load_tokenizer(name)
    with pytest.raises(InputError, match="neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)


def test_keep_case(default_tokenizer: PreTrainedTokenizerFast, bert_like_vocabulary: Path, tmp_path: Path) -> None:
    cased = load_tokenizer(keep_case=True)
    assert cased.decode(cased.encode("Hello 世界 ABC")) == "Hello世界ABC"
    assert default_tokenizer.decode(default_tokenizer.encode("Hello 世界 ABC")) == "hello世界abc"
    with pytest.raises(InputError, match="no capital letters"):
        load_tokenizer(bert_like_vocabulary, keep_case=True)
    default_tokenizer.save_pretrained(tmp_path / "lower")
    with pytest.raises(InputError, match="built to lower-case"):
        load_tokenizer(tmp_path / "lower", keep_case=True)
    # What was saved with its case keeps it, asked or not.
    cased.save_pretrained(tmp_path / "cased")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "cased")) == tokenizer_fingerprint(cased)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "cased", keep_case=True)) == tokenizer_fingerprint(cased)


def test_segmenting_with_a_list_of_words(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(SPECIAL + "的\n我们\n研究\n研究生\n生命\n命\n生\n研\n究\n，\na\nb\n", encoding="utf-8")
    tokenizer = load_tokenizer(path, segment=True)
    # 研究生|命 and 研究|生命 have as many words; the earlier, more frequent lines win.
    ids = tokenizer.encode("我们研究生命，研究生的㐱ab")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("我们", "研究", "生命", "，", "研究生", "的", "[UNK]", "a", "b"),
    ]
    # A known word is never cut, however frequent its parts.
    assert tokenizer.tokenize("研究生") == ["研究生"]
    assert tokenizer.decode(tokenizer.encode("我们 研究\n生命")) == "我们研究\n生命"
    assert load_tokenizer(path).tokenize("我们研") == ["[UNK]", "[UNK]", "研"]


def test_segmenting_needs_words(default_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(SPECIAL + "的\n我\n##们\n", encoding="utf-8")
    default_tokenizer.save_pretrained(tmp_path / "saved")
    for path in (None, tmp_path / "vocab.txt", tmp_path / "saved"):
        with pytest.raises(InputError, match="--segment --corpus"):
            load_tokenizer(path, segment=True)


def test_unknown_counter(default_tokenizer: PreTrainedTokenizerFast) -> None:
    counter = UnknownCounter(default_tokenizer)
    assert counter.share == 0
    assert counter.message() == ""
    plain = "你好" * 100
    counter.add(plain, default_tokenizer.encode(plain))
    assert (counter.tokens, counter.unknown, counter.message()) == (200, 0, "")
    strange = "㐱㐱㐲\ue000" + "好" * 196
    counter.add(strange, default_tokenizer.encode(strange))
    assert (counter.tokens, counter.unknown, counter.share) == (400, 4, 0.01)
    assert counter.message() == ""
    counter.add("㐲㐳㐲", default_tokenizer.encode("㐲㐳㐲"))
    assert counter.most_frequent(2) == [("㐲", 3), ("㐱", 2)]
    message = counter.message()
    assert message.startswith("1.74% of the tokens are [UNK] (7 of 403)")
    assert "㐲 x 3, 㐱 x 2, 㐳 x 1, U+E000 x 1" in message
    assert "\n" not in message
