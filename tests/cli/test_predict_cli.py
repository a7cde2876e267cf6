"""predict.py from the outside: what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.prediction import main
from reformer_lm.prediction.reports import format_perplexity
from reformer_lm.scoring import score
from reformer_lm.text import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
SENTENCES = ["山水", "他把书放在桌上。", "春天来了，花开了。", "山", "月亮\n很圆"]


def good(result: SimpleNamespace) -> SimpleNamespace:
    assert result.status == 0, result.err
    assert "error" not in result.err
    assert "Warning" not in result.err
    return result


# --- generating


def test_a_single_text_is_printed_after_its_prompt(predict):
    result = good(predict("--text", "山水", "--length", "10", "--seed", "1"))
    assert result.out.startswith("山水")
    assert result.out.endswith("\n")
    assert len(result.out) > 4
    assert re.fullmatch(r"seed 1; \d+ tokens in [\d.]+ s, [\d.]+ tokens/s\n", result.err)


def test_quiet_prints_the_text_and_nothing_else(predict):
    loud = good(predict("--text", "山水", "--length", "10", "--seed", "1"))
    quiet = good(predict("--text", "山水", "--length", "10", "--seed", "1", "--quiet"))
    assert quiet.out == loud.out
    assert quiet.err == ""


def test_streamed_and_printed_text_are_the_same(predict):
    streamed = good(predict("--text", "山水", "--length", "30", "--seed", "1"))
    (record,) = map(json.loads, predict("--text", "山水", "--length", "30", "--seed", "1", "--json").out.splitlines())
    assert streamed.out == f"山水{record['text']}\n"


def test_the_seed_decides(predict):
    texts = [predict("--text", "山水", "--length", "10", "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_random_seed_is_named_and_repeats_the_text(predict):
    first = good(predict("--text", "山水", "--length", "10"))
    second = good(predict("--text", "山水", "--length", "10"))
    assert first.out != second.out
    seed = re.match(r"seed (\d+);", first.err).group(1)
    assert predict("--text", "山水", "--length", "10", "--seed", seed).out == first.out


def test_several_samples_have_headers(predict):
    result = good(predict("--text", "山", "--text", "水", "--nsamples", "2", "--length", "5", "--seed", "1"))
    headers = [line for line in result.out.splitlines() if line.startswith("=====")]
    assert headers == [
        f"===== prompt {prompt} of 2, sample {sample} of 2 =====" for prompt in (1, 2) for sample in (1, 2)
    ]
    quiet = good(predict("--text", "山", "--text", "水", "--nsamples", "2", "--length", "5", "--seed", "1", "--quiet"))
    assert quiet.err == ""
    assert quiet.out == "".join(line + "\n" for line in result.out.split("\n")[:-1] if not line.startswith("====="))


def test_json_lines_tell_how_to_repeat_them(predict):
    result = good(
        predict(
            *("--text", "山", "--text", "水", "--nsamples", "3", "--batch_size", "2", "--length", "5"),
            *("--temperature", "0.7", "--top_k", "9", "--top_p", "0.8", "--repetition_penalty", "1.2"),
            *("--seed", "4", "--json", "--quiet"),
        )
    )
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["prompt"], record["sample"]) for record in records] == [(p, s) for p in "山水" for s in range(3)]
    for record in records:
        assert record["seed"] == 4
        assert record["settings"] == {
            "length": 5,
            "temperature": 0.7,
            "top_k": 9,
            "top_p": 0.8,
            "repetition_penalty": 1.2,
            "min_p": 0.0,
            "typical_p": 1.0,
            "no_repeat_ngram": 0,
            "stop": [],
            "overflow": "error",
        }
        assert record["tokens_per_second"] > 0
        assert record["finish_reason"] == ("length" if record["tokens"] == 5 else "end")
    assert len({record["text"] for record in records}) > 1


@pytest.mark.parametrize("batch_size", ["1", "4", "100"])
def test_samples_do_not_depend_on_the_batch_size(predict, batch_size):
    arguments = ("--text", "山", "--text", "春天来了", "--nsamples", "3", "--length", "8", "--seed", "3")
    assert good(predict(*arguments, "--batch_size", batch_size)).out == good(predict(*arguments)).out


def test_articles_from_nothing(predict):
    result = good(predict("--unconditional", "--nsamples", "2", "--length", "6", "--seed", "1", "--json"))
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["prompt"] for record in records] == ["", ""]
    assert records[0]["text"] != records[1]["text"]


def test_text_longer_than_the_model_slides_on_if_asked_to(predict):
    arguments = ("--length", "100", "--seed", "1", "--overflow", "slide")
    result = good(predict("--text", "山" * 100, *arguments))
    assert result.err.splitlines()[0].startswith("the prompt has 101 tokens")
    assert result.out.startswith("山" * 100)
    (record,) = map(json.loads, good(predict("--text", "山" * 100, *arguments, "--json")).out.splitlines())
    assert result.out == f"{'山' * 100}{record['text']}\n"


def test_stop_strings_end_the_text_before_them(predict):
    arguments = ("--text", "山", "--length", "40", "--seed", "1")
    whole = good(predict(*arguments, "--quiet")).out.rstrip("\n")
    stop = whole[10:12]
    stopped = good(predict(*arguments, "--quiet", "--stop", "no such text", "--stop", stop)).out
    assert stopped == whole[: whole.index(stop, 1)] + "\n"
    (record,) = map(json.loads, good(predict(*arguments, "--stop", stop, "--json")).out.splitlines())
    assert record["finish_reason"] == "stop" and record["settings"]["stop"] == [stop]
    assert "山" + record["text"] + "\n" == stopped


def test_names_of_gpt2_chinese_are_understood(predict):
    ours = good(predict("--text", "山", "--length", "9", "--top_k", "5", "--top_p", "0.9", "--seed", "1"))
    theirs = good(predict("--prefix", "山", "--length", "9", "--topk", "5", "--topp", "0.9", "--seed", "1"))
    assert theirs.out == ours.out


# --- where texts come from


def test_files_of_every_format_hold_the_same_prompts(predict, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff山\r\n\r\n水\n".encode())
    (tmp_path / "a.json").write_text('["山", "水"]', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "山"}\n{"text": "水", "id": 7}\n', encoding="utf-8")
    arguments = ("--length", "5", "--seed", "1", "--quiet")
    expected = good(predict("--text", "山", "--text", "水", *arguments)).out
    for name in ("a.txt", "a.json", "a.jsonl"):
        assert good(predict("--file", str(tmp_path / name), *arguments)).out == expected
    assert good(predict("--file", "-", *arguments, stdin="山\n水".encode())).out == expected


def test_texts_of_options_come_before_those_of_the_file(predict, tmp_path):
    (tmp_path / "a.txt").write_text("水\n火\n", encoding="utf-8")
    result = good(predict("--ppl", "--file", str(tmp_path / "a.txt"), "--text", "山"))
    assert [line.split("\t")[2] for line in result.out.splitlines()] == ["山", "水", "火"]


def test_interactive_answers_each_line_and_survives_mistakes(predict):
    lines = b"\n".join(["山".encode(), b"\xff\xfe", "山".encode(), b"", "水".encode()])
    result = predict("--interactive", "--length", "5", "--seed", "1", stdin=lines)
    assert result.status == 0
    assert "error: stdin: invalid UTF-8 at byte 0" in result.err
    assert result.err.count("> ") == 4
    # The empty line ends, so the last one has no answer; the same prompt has another answer the second time.
    assert result.err.count("seed 1;") == 2
    assert result.out.count("山") >= 2
    assert "水" not in result.out
    first = good(predict("--text", "山", "--length", "5", "--seed", "1")).out
    assert result.out.startswith(first)
    assert result.out != 2 * first


def test_interactive_goes_on_with_the_text_until_another_begins(predict):
    lines = "山\n水\n/new\n山".encode()
    records = [
        json.loads(line)
        for line in good(
            predict("--interactive", "--length", "5", "--seed", "1", "--json", stdin=lines)
        ).out.splitlines()
    ]
    assert [record["prompt"] for record in records] == ["山", "水", "山"]
    (alone,) = map(json.loads, good(predict("--text", "水", "--length", "5", "--seed", "1", "--json")).out.splitlines())
    assert records[1]["text"] != alone["text"]
    # The second time a text begins so, it goes on differently.
    assert records[2]["text"] != records[0]["text"]


def test_interactive_says_when_the_text_is_full(predict):
    result = predict("--interactive", "--length", "25", "--seed", "1", stdin="山\n水\n火\n/new\n山".encode())
    assert result.status == 0
    assert result.err.count("error:") == 1
    assert "the text has grown too long" in result.err and "begin anew" in result.err
    assert result.err.count("seed 1;") == 3


def test_interactive_ends_with_its_input(predict):
    result = good(predict("--interactive", "--quiet", "--ppl", stdin="山\n水".encode()))
    assert [line.split("\t")[2] for line in result.out.splitlines()] == ["山", "水"]
    assert result.err == ""


# --- scoring


def test_ppl_prints_a_line_for_each_text_in_order(predict, saved_model_dir):
    result = good(predict("--ppl", *[word for text in SENTENCES for word in ("--text", text)]))
    model = ReformerLMForCausalLM.from_pretrained(saved_model_dir).eval()
    scores = score(model, load_tokenizer(saved_model_dir), SENTENCES)
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert [row[2] for row in rows] == [text.replace("\n", "\\n") for text in SENTENCES]
    assert [int(row[1]) for row in rows] == [s.tokens for s in scores] == [len(text) for text in SENTENCES]
    assert [float(row[0]) for row in rows] == pytest.approx([s.ppl for s in scores], rel=1e-4)
    tokens, nll = sum(s.tokens for s in scores), sum(s.nll for s in scores)
    overall, mean = (
        float(x) for x in re.search(r"all tokens ([\d.]+), mean PPL of the texts ([\d.]+)", result.err).groups()
    )
    assert overall == pytest.approx(torch.tensor(nll / tokens).exp().item(), rel=1e-4)
    assert mean == pytest.approx(sum(s.ppl for s in scores) / len(scores), rel=1e-4)
    assert f"{len(SENTENCES)} texts, {tokens} tokens, 0 unknown" in result.err


def test_ppl_is_the_same_on_every_run_alone_and_in_a_batch(predict):
    arguments = [word for text in SENTENCES for word in ("--text", text)]
    together = good(predict("--ppl", *arguments)).out
    assert good(predict("--ppl", *arguments)).out == together
    assert "".join(good(predict("--ppl", "--text", text)).out for text in SENTENCES) == together
    backwards = [word for text in SENTENCES[::-1] for word in ("--text", text)]
    assert good(predict("--ppl", *backwards)).out.splitlines()[::-1] == together.splitlines()
    assert good(predict("--ppl", *arguments, "--batch_size", "2")).out == together


def test_ppl_of_a_single_text_has_no_totals(predict):
    assert good(predict("--ppl", "--text", "山水")).err == ""
    assert good(predict("--ppl", "--text", "山水", "--text", "山", "--quiet")).err == ""


def test_ppl_as_json_lines(predict):
    result = good(predict("--ppl", "--json", "--text", "山水\ue000", "--text", "", "--quiet"))
    scored, empty = map(json.loads, result.out.splitlines())
    assert scored["text"] == "山水\ue000"
    assert (scored["tokens"], scored["unknown"], scored["characters"]) == (3, 1, 3)
    assert scored["ppl"] == pytest.approx(2.718281828459045 ** (scored["nll"] / 3))
    assert scored["bits_per_character"] == pytest.approx(scored["nll"] / 3 / 0.6931471805599453)
    assert (empty["ppl"], empty["nll"], empty["tokens"]) == (None, 0.0, 0)


def test_empty_lines_keep_their_place(predict, tmp_path):
    (tmp_path / "a.txt").write_text("山\n\n水\n", encoding="utf-8")
    result = good(predict("--ppl", "--file", str(tmp_path / "a.txt")))
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert rows[1] == ["-", "0", "(empty)"]
    assert [row[2] for row in rows] == ["山", "(empty)", "水"]
    assert "3 texts (1 empty), 2 tokens" in result.err


def test_a_text_longer_than_the_window_is_scored_whole(predict):
    result = good(predict("--ppl", "--text", "山水花月" * 50))
    assert result.out.split("\t")[1] == "200"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1.0000"),
        (12.34567, "12.346"),
        (99.9999, "100.00"),
        (12345.6, "12346"),
        (1234567.8, "1234568"),
        (float("nan"), "-"),
        (float("inf"), "inf"),
    ],
)
def test_perplexities_have_five_digits(value, shown):
    assert format_perplexity(value) == shown


def test_a_model_in_half_precision_is_scored_in_float32(predict, saved_model_dir, tmp_path):
    model = ReformerLMForCausalLM.from_pretrained(saved_model_dir).bfloat16()
    model.save_pretrained(tmp_path / "half")
    load_tokenizer(saved_model_dir).save_pretrained(tmp_path / "half")
    (record,) = map(
        json.loads,
        good(predict("--ppl", "--json", "--text", "山水", model_dir=tmp_path / "half")).out.splitlines(),
    )
    (expected,) = score(model.float().eval(), load_tokenizer(saved_model_dir), ["山水"])
    assert record["nll"] == pytest.approx(expected.nll, rel=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-5), ("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_number_format_can_be_chosen(predict, saved_model_dir, dtype, bound):
    texts = ["--text", "山水", "--text", "山水" * 20]
    (precise,), (other,) = (
        [[json.loads(line)["nll"] for line in good(predict("--ppl", "--json", *texts, *options)).out.splitlines()]]
        for options in ((), ("--dtype", dtype))
    )
    assert other == pytest.approx(precise, rel=bound)
    # In another format a number is not quite the same.
    assert (other == precise) == (dtype == "float32")
    assert len(good(predict("--text", "山", "--length", "5", "--dtype", dtype)).out.strip()) > 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = "text file unconditional interactive ppl model_dir device batch_size json quiet length nsamples"
    for option in [*options.split(), "temperature", "top_k", "top_p", "repetition_penalty", "seed"]:
        assert f"--{option}" in text


# --- as a program


def program(*arguments: str, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "predict.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        cwd=REPOSITORY,
        **options,
    )


def test_the_script_scores_like_the_function(predict, saved_model_dir):
    process = program("--ppl", "--text", "山水", "--model_dir", str(saved_model_dir), "--device", "cpu")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == good(predict("--ppl", "--text", "山水")).out


def test_the_script_bears_a_reader_that_goes_away(saved_model_dir):
    process = program("--ppl", "--file", "-", "--model_dir", str(saved_model_dir), stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("山\n" * 100)
    process.stdin.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
