"""predict.py --ppl with files of every kind, --output, --sort, --threshold, --compare, --explain and --html."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.errors import InputError
from reformer_lm.prediction import explanation, fluency_page, result_file
from reformer_lm.prediction.comparison import differences
from reformer_lm.prediction.fluency_page import FluencyPage
from reformer_lm.prediction.result_file import ResultFile
from reformer_lm.scoring import Score, score
from reformer_lm.text import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
SENTENCES = ["山水", "他把书放在桌上。", "", "春天来了，花开了。", "山", "月亮\n很圆，\t真的"]


def good(result: SimpleNamespace) -> SimpleNamespace:
    assert result.status == 0, result.err
    return result


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(saved_model_dir):
    model = ReformerLMForCausalLM.from_pretrained(saved_model_dir).eval()
    return score(model, load_tokenizer(saved_model_dir), SENTENCES)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- where texts come from


def test_files_of_every_kind_hold_the_same_texts(predict, tmp_path):
    texts = ["山水", "他说“好”，走了"]
    (tmp_path / "a.csv").write_text('id,text\n1,山水\n2,"他说“好”，走了"\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("text\tid\n山水\t1\n他说“好”，走了\t2\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("1\t山水\n2\t他说“好”，走了\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts), encoding="utf-8")
    (tmp_path / "d.txt").write_bytes("\r\n".join(texts).encode("gb18030"))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress("text\n山水\n他说“好”，走了\n".encode()))
    wanted = good(predict("--ppl", "--text", texts[0], "--text", texts[1])).out
    for name, *options in (
        ("a.csv",), ("a.tsv",), ("b.tsv", "--column", "2"), ("c.jsonl", "--field", "body"),
        ("d.txt", "--encoding", "gb18030"), ("e.txt.gz",), ("f.csv.gz",),
    ):  # fmt: skip
        assert good(predict("--ppl", "--file", str(tmp_path / name), *options)).out == wanted, name
    stdin = good(predict("--ppl", "--file", "-", "--encoding", "gb18030", stdin="\n".join(texts).encode("gb18030")))
    assert stdin.out == wanted


def test_cells_may_have_line_breaks(predict, tmp_path):
    (tmp_path / "a.csv").write_text('text\n"月亮\n很圆"\n', encoding="utf-8")
    assert good(predict("--ppl", "--file", str(tmp_path / "a.csv"))).out.endswith("\t月亮\\n很圆\n")


def test_faults_of_a_file_are_found_before_anything_is_scored(predict, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "山"}\n{"text": 水}\n', encoding="utf-8")
    result = predict("--ppl", "--file", str(tmp_path / "a.jsonl"))
    assert (result.status, result.out) == (2, "")
    assert "line 2" in result.err


# --- --output


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_results_in_a_file(predict, sentences, expected, tmp_path, ending):
    out = tmp_path / f"scores{ending}"
    result = good(predict("--ppl", "--file", str(sentences), "--output", str(out)))
    assert result.out == ""
    assert f"{len(SENTENCES)} results" in result.err and "PPL over all tokens" in result.err
    if ending == ".jsonl":
        records = lines_of(out)
    else:
        text = out.read_text(encoding="utf-8")
        if ending == ".csv":
            records = list(csv.DictReader(text.splitlines(keepends=True)))
        else:
            head, *rows = (line.split("\t") for line in text.splitlines())
            records = [dict(zip(head, row, strict=True)) for row in rows]
    wanted = [text if ending != ".tsv" else re.sub(r"[\n\t]", " ", text) for text in SENTENCES]
    assert [record["text"] for record in records] == wanted
    assert [int(record["index"]) for record in records] == list(range(len(SENTENCES)))
    for record, one in zip(records, expected, strict=True):
        assert int(record["tokens"]) == one.tokens
        assert float(record["nll"]) == pytest.approx(one.nll, rel=1e-6)
        if one.tokens:
            assert float(record["ppl"]) == pytest.approx(one.ppl, rel=1e-6)
            assert float(record["bits_per_byte"]) == pytest.approx(one.bits_per_byte, rel=1e-6)
        else:
            assert record["ppl"] in (None, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, sentences.name])


@pytest.mark.parametrize("after", [0, 1, 3, len(SENTENCES)])
@pytest.mark.parametrize("torn", [b"", b'{"index": 3, "te', b'{"index": 3}'])
def test_an_interrupted_run_goes_on(predict, sentences, tmp_path, monkeypatch, after, torn):
    out, other = tmp_path / "scores.jsonl", tmp_path / "straight.jsonl"
    options = ("--ppl", "--file", str(sentences))
    straight = good(predict(*options, "--output", str(other)))
    write = ResultFile.write

    def interrupted(self: ResultFile, *arguments: object) -> None:
        if self.totals.texts == after:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(ResultFile, "write", interrupted)
    if after == len(SENTENCES):
        monkeypatch.setattr(ResultFile, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert predict(*options, "--output", str(out)).status == 130
    monkeypatch.undo()
    partial = tmp_path / "scores.jsonl.partial"
    assert not out.exists() and len(partial.read_bytes().splitlines()) == 1 + after
    with partial.open("ab") as file:
        file.write(torn)
    result = good(predict(*options, "--output", str(out)))
    assert out.read_bytes() == other.read_bytes()
    assert not partial.exists()
    assert (f"going on after {after} texts" in result.err) == (after > 0)
    # The totals are those of the whole.
    assert result.err.splitlines()[-1] == straight.err.splitlines()[-1]


def test_results_of_another_run_are_not_mixed(predict, sentences, tmp_path):
    out = tmp_path / "scores.jsonl"
    partial = tmp_path / "scores.jsonl.partial"
    partial.write_text("something else\n", encoding="utf-8")
    result = predict("--ppl", "--file", str(sentences), "--output", str(out))
    assert result.status == 2 and "results of another run are there" in result.err
    partial.unlink()
    identity = {"options": {"add_eos": True}, "file": "x"}
    ResultFile(out, identity)
    with pytest.raises(InputError, match=r"other options\)"):
        ResultFile(out, {**identity, "options": {}})
    result = predict("--ppl", "--file", str(sentences), "--output", str(out))
    assert result.status == 2 and str(partial) in result.err
    assert partial.exists()


def test_a_full_disk_keeps_what_was_scored(tmp_path, expected, monkeypatch):
    file = ResultFile(tmp_path / "a.csv", {})
    file.write(expected[0])

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(InputError, match="No space left"):
        file.write(expected[1])
    again = ResultFile(tmp_path / "a.csv", {})
    assert again.taken_over == 1


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_and_above_or_below_a_threshold(predict, sentences, expected, tmp_path, order):
    scored = [one for one in expected if one.tokens]
    limit = sorted(one.ppl for one in scored)[2]
    sign = 1 if order == "ascending" else -1
    out = tmp_path / "scores.jsonl"
    for invert in (False, True):
        # A text without tokens is not above any threshold.
        wanted = [one for one in expected if (one.ppl > limit) == invert]
        wanted.sort(key=lambda one: sign * one.ppl if one.tokens else math.inf)
        options = ["--ppl", "--file", str(sentences), "--sort", order, "--threshold", str(limit)]
        options += ["--invert"] * invert
        result = good(predict(*options, "--json"))
        assert [json.loads(line)["text"] for line in result.out.splitlines()] == [one.text for one in wanted]
        assert f"{len(wanted)} of {len(SENTENCES)} texts have a PPL {'above' if invert else 'of at most'}" in result.err
        good(predict(*options, "--output", str(out)))
        assert [record["text"] for record in lines_of(out)] == [one.text for one in wanted]


# --- --compare and --explain


def test_compare_says_which_and_where(predict, saved_model_dir):
    texts = "他把门轻轻关上。", "他把轻门轻关上。"
    result = good(predict("--ppl", "--compare", *texts, "--json"))
    record = json.loads(result.out)
    model = ReformerLMForCausalLM.from_pretrained(saved_model_dir).eval()
    first, second = score(model, load_tokenizer(saved_model_dir), texts)
    assert record["more_fluent"] == ("A" if first.nll < second.nll else "B")
    places = record["places"]
    assert "".join(place["first"] for place in places) == texts[0]
    assert "".join(place["second"] for place in places) == texts[1]
    assert sum(place["first_nll"] for place in places) == pytest.approx(first.nll, rel=1e-6)
    assert sum(place["second_nll"] for place in places) == pytest.approx(second.nll, rel=1e-6)
    assert any(place["kind"] == "insert" for place in places)
    shown = good(predict("--ppl", "--compare", *texts)).out
    assert f"{record['more_fluent']} is more fluent" in shown
    assert "(nothing) -> 轻" in shown


def test_compare_of_equal_and_of_empty_texts(predict):
    assert "both are equally likely" in good(predict("--ppl", "--compare", "山水", "山水")).out
    assert "both are equally likely" not in good(predict("--ppl", "--compare", "山水", "山")).out
    assert good(predict("--ppl", "--compare", "", "山")).out


def made_up(text: str, bits: list[float]) -> Score:
    surprisals = tuple(value * math.log(2) for value in bits)
    count = len(text)
    return Score(
        text, math.fsum(surprisals), count, 0, tuple(range(count)), surprisals, tuple((i, i + 1) for i in range(count)),
        ranks=(1,) * count, alternatives=(((5, -0.5), (6, -1.0)),) * count,
    )  # fmt: skip


def test_longer_texts_are_judged_per_character_too():
    from reformer_lm.prediction.comparison import better, comparison_lines

    short, long = made_up("山水", [6, 6]), made_up("山水花月", [4, 4, 3, 3])
    assert better(short, long) == ("A", "B")
    assert any("per character B is ahead" in line for line in comparison_lines(short, long, colours=False))
    assert [place.kind for place in differences(short, long)] == ["equal", "insert"]


def test_tints_follow_the_bits():
    assert [explanation.tint(bits) for bits in (0, 1.99, 2, 5, 9, 11.9, 12, 40, math.inf)] == [
        0,
        0,
        1,
        2,
        4,
        5,
        6,
        6,
        6,
    ]
    text, bits = "山水花月", [1.0, 12.5, 13.0, 3.0]
    assert explanation.tinted(text, bits, colours=False) == "山[水花]月"
    coloured = explanation.tinted(text, bits, colours=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == text
    assert coloured.count("\x1b[0m") == 2
    assert explanation.tinted("山\n水", [13, 13, 0], colours=False) == "[山\\n]水"


def test_explain_names_what_was_expected(predict, saved_model_dir):
    result = good(predict("--ppl", "--explain", "--text", "他把门关上"))
    first, *places = result.out.splitlines()
    assert re.sub(r"[\[\]]", "", first).endswith("他把门关上")
    assert places and all(re.search(r"bits, rank [\d,]+; expected: .+%", line) for line in places)
    assert "less likely than one in 1,024" in result.err
    record = json.loads(good(predict("--ppl", "--explain", "--json", "--text", "他把门关上")).out)
    assert [entry["token"] for entry in record["explanation"]] == list("他把门关上")
    assert math.fsum(e["bits"] for e in record["explanation"]) == pytest.approx(record["nll"] / math.log(2), rel=1e-6)
    for entry in record["explanation"]:
        likeliest = entry["alternatives"][0]["probability"]
        assert (entry["rank"] == 1) == (likeliest == pytest.approx(2 ** -entry["bits"], rel=1e-5))


def test_no_colour_where_it_is_not_wanted(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert explanation.has_colours(terminal)
    assert not explanation.has_colours(SimpleNamespace(isatty=lambda: False))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not explanation.has_colours(terminal)


# --- --html


class Reader(HTMLParser):
    """The text of a page, and what its tags refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.titles, self.tags = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        assert not [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_the_page_shows_every_text_and_what_was_expected(predict, sentences, tmp_path):
    path = tmp_path / "report.html"
    result = good(predict("--ppl", "--file", str(sentences), "--html", str(path), "--text", "<b>&"))
    reader = read(path)
    assert "script" not in reader.tags and "link" not in reader.tags
    for text in SENTENCES:
        assert text in reader.text
    assert "<b>&" in reader.text
    assert sum("expected: " in title for title in reader.titles) == sum(
        int(line.split("\t")[1]) for line in result.out.splitlines()
    )
    assert re.search(r"\d to [\d,.]+: \d texts \(", reader.text), "the histogram's bars say how many they are"
    assert "Least fluent passages" in reader.text


def test_a_page_with_an_output_begins_anew(predict, sentences, tmp_path):
    out, page = tmp_path / "a.jsonl", tmp_path / "a.html"
    (tmp_path / "a.jsonl.partial").write_text("of another run\n", encoding="utf-8")
    good(predict("--ppl", "--file", str(sentences), "--output", str(out), "--html", str(page), "--explain"))
    assert len(lines_of(out)) == len(SENTENCES) and "explanation" in lines_of(out)[0]
    assert "春天来了" in read(page).text


def test_a_page_of_many_and_of_long_texts_stays_small(monkeypatch, tmp_path):
    monkeypatch.setattr(fluency_page, "MAX_TEXTS", 5)
    monkeypatch.setattr(fluency_page, "MAX_TOKENS_OF_A_TEXT", 50)
    page = FluencyPage(load_tokenizer(), {"model": "made up"})
    for number in range(40):
        page.add(made_up(chr(ord("一") + number) * 8, [1 + (number * 7) % 40] * 8))
    page.add(made_up("很" * 500, [50.0] * 500))
    page.write(tmp_path / "a.html")
    reader = read(tmp_path / "a.html")
    assert "The 5 least fluent of 41 are shown." in reader.text
    assert "450 more characters" in reader.text
    assert reader.text.count("bits per character") == 5 + 1
    assert sum("expected" in title for title in reader.titles) == 50 + 4 * 8
    # The histogram counts all of them.
    assert sum(int(count) for count in re.findall(r": (\d+) texts \(", reader.text)) == 41


def test_passages_are_the_worst_stretches():
    bits = [1.0] * 100
    for place in range(40, 56):
        bits[place] = 9.0
    worst = fluency_page._worst_passages(made_up("".join(chr(0x4E00 + i) for i in range(100)), bits), 7)
    assert worst[0].bits == pytest.approx(9.0)
    assert (worst[0].text_number, worst[0].passage[0]) == (7, chr(0x4E00 + 40))
    assert len(worst) == fluency_page.PASSAGES_OF_A_TEXT
    assert worst[0].before == "".join(chr(0x4E00 + i) for i in range(28, 40))


# --- other models, several processes


def test_any_causal_model_of_transformers(predict, saved_model_dir, tmp_path):
    tokenizer = load_tokenizer(saved_model_dir)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    words = ("--text", "山水", "--text", "春天来了，花开了。" * 10)
    result = good(predict("--ppl", "--json", "--explain", *words, model_dir=tmp_path / "gpt2"))
    assert [json.loads(line)["tokens"] for line in result.out.splitlines()] == [2, 90]


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(predict, saved_model_dir, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"第{number}句，春天来了。\n" for number in range(2500)), encoding="utf-8")
    options = ["--ppl", "--file", str(path), "--model_dir", str(saved_model_dir), "--device", "cpu", "--output"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "predict.py"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options, str(tmp_path / "two.jsonl")], cwd=REPOSITORY, env=environment, check=True)
    good(predict(*options[:3], "--output", str(tmp_path / "one.jsonl")))
    one, two = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    assert [record["text"] for record in one] == [record["text"] for record in two]
    assert [r["nll"] for r in one] == pytest.approx([r["nll"] for r in two], abs=1e-4)


def test_several_processes_cannot_share_stdin(predict, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = predict("--ppl", "--file", "-", stdin="山".encode())
    assert result.status == 2 and "cannot share stdin" in result.err


def test_the_columns_are_those_of_the_records(expected):
    from reformer_lm.prediction.reports import score_record

    assert tuple(score_record(expected[0], 0)) == result_file.COLUMNS
