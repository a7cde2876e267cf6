import json
from pathlib import Path
from typing import Any

import pytest

from reformer_lm.errors import InputError
from reformer_lm.training.arguments import FIELDS, TrainingArguments, build_parser, parse_arguments
from reformer_lm.training.config_files import read_config

# GPT2-Chinese's flags and those beside them; scripts rely on the names.
PROMISED = """
    raw raw_data_path tokenized_data_path tokenizer_path model_config epochs batch_size lr
    warmup_steps log_step stride gradient_accumulation fp16 max_grad_norm num_pieces min_length
    output_dir pretrained_model writer_dir segment bpe_token device bf16 max_steps max_seq_len seed
    eval_every save_every sample_every resume val_data_path lr_schedule weight_decay quiet
    init_from restore train_only optimizer noise early_stopping ema save_total_limit fsdp compile
    report_to print_config
    text_field txt_articles encoding workers val_split pad_articles
""".split()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(content: Any, name: str = "c.json") -> str:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return name


def test_all_promised_flags_exist_and_are_explained() -> None:
    text = build_parser().format_help()
    assert all(f"--{name}" in text for name in PROMISED)


def test_defaults() -> None:
    request = parse_arguments([])
    assert request.arguments == TrainingArguments()
    assert request.config_file is None
    assert request.given == frozenset()


def test_command_line_beats_file_beats_defaults() -> None:
    name = config({"model": {"hidden_size": 8}, "training": {"lr": 1, "epochs": 7, "raw": True}})
    request = parse_arguments(["--model_config", name, "--epochs", "2"])
    assert request.arguments == TrainingArguments(model_config=name, lr=1.0, epochs=2, raw=True)
    assert isinstance(request.arguments.lr, float)
    assert request.config_file is not None
    assert request.config_file.model == {"hidden_size": 8}
    assert request.given == {"model_config", "epochs"}


def test_default_config_file_is_read_where_it_exists() -> None:
    config({"training": {"epochs": 9}}, "configs/tiny.json")
    assert parse_arguments([]).arguments.epochs == 9
    assert parse_arguments(["--model_config", config({})]).arguments.epochs == TrainingArguments().epochs


def test_switches_of_a_file_can_be_turned_off() -> None:
    name = config({"training": {"bf16": True, "raw": True}})
    arguments = parse_arguments(["--model_config", name, "--no_raw"]).arguments
    assert (arguments.bf16, arguments.raw) == (True, False)
    # One precision is meant; the command line's replaces the file's.
    arguments = parse_arguments(["--model_config", name, "--fp16"]).arguments
    assert (arguments.fp16, arguments.bf16) == (True, False)
    with pytest.raises(InputError, match="choose one"):
        parse_arguments(["--fp16", "--bf16"])


def test_one_path_or_several() -> None:
    assert parse_arguments(["--raw_data_path", "a", "b c", "--raw"]).arguments.raw_data_path == ("a", "b c")
    assert parse_arguments(["--val_data_path=a"]).arguments.val_data_path == ("a",)
    name = config({"training": {"raw_data_path": "a.json", "val_data_path": ["b", "c"]}})
    arguments = parse_arguments(["--model_config", name]).arguments
    assert (arguments.raw_data_path, arguments.val_data_path) == (("a.json",), ("b", "c"))
    assert parse_arguments(["--model_config", name, "--raw_data_path", "d"]).arguments.raw_data_path == ("d",)


def test_null_means_not_given() -> None:
    assert parse_arguments(["--model_config", config({"training": {"max_steps": None}})]).arguments.max_steps is None
    with pytest.raises(InputError, match="'epochs' is None; it must be a whole number"):
        parse_arguments(["--model_config", config({"training": {"epochs": None}})])


def test_flat_file_is_the_model_part() -> None:
    request = parse_arguments(["--model_config", config('\ufeff{"hidden_size": 8, "vocab_size": 9}')])
    assert request.config_file is not None
    assert request.config_file.model == {"hidden_size": 8, "vocab_size": 9}
    assert request.config_file.training == {}


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--batchsize=3"], "unknown option --batchsize; did you mean --batch_size?"),
        (["--gradient-accumulation", "3"], "did you mean --gradient_accumulation?"),
        (["--outputdir", "x"], "did you mean --output_dir?"),
        (["train.json"], "unexpected argument 'train.json'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--stride", "0"], "--stride is 0; it must be at least 1"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--batch_size", "-2"], "--batch_size is -2; it must be at least 1"),
        (["--epochs", "1.5"], "--epochs is '1.5'; it must be a whole number"),
        (["--epochs", "many"], "--epochs is 'many'; it must be a whole number"),
        (["--lr", "-1"], "--lr is -1; it must be greater than 0"),
        (["--lr=-1e-4"], "--lr is -1e-4; it must be greater than 0"),
        (["--lr", "nan"], "--lr is nan; it must be a finite number"),
        (["--lr", "inf"], "--lr is inf; it must be a finite number"),
        (["--lr", "fast"], "--lr is 'fast'; it must be a number"),
        (["--max_seq_len", "1"], "--max_seq_len is 1; it must be at least 2"),
        (["--max_steps", "0"], "--max_steps is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--warmup_steps", "-1"], "--warmup_steps is -1; it must be at least 0"),
        (["--weight_decay", "-0.1"], "--weight_decay is -0.1; it must be at least 0"),
        (["--max_grad_norm", "0"], "--max_grad_norm is 0; it must be greater than 0"),
        (["--min_lr_ratio", "2"], "--min_lr_ratio is 2; it must be from 0 to 1"),
        (["--lr_schedule", "cosin"], "--lr_schedule is cosin; it must be one of cosine, linear, constant"),
        (["--output_dir", ""], "--output_dir is ; it must be a path"),
        (["--raw_data_path"], "argument --raw_data_path: expected at least one argument"),
        (["--raw_data_path", "a", ""], "--raw_data_path is a ; it must be a path"),
        (["--val_split", "1"], "--val_split is 1; it must be at least 0 and less than 1"),
        (["--val_split", "0.1", "--val_data_path", "a.json"], "--val_split and --val_data_path are both given"),
        (["--pad_articles", "--separate_articles"], "--pad_articles and --separate_articles are both given"),
        (["--encoding", "big5"], "--encoding is big5; it must be one of utf-8, gb18030"),
        (["--txt_articles", "page"], "--txt_articles is page; it must be one of blank, line, file"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--text_field", " "], "--text_field is  ; it must not be empty"),
        (["--model_config", "missing.json"], "missing.json: no such configuration file"),
        (["--model_config", "."], ".: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_are_named_in_one_line(argv: list[str], fragment: str) -> None:
    with pytest.raises(InputError) as error:
        parse_arguments(argv)
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"training": {"batchsize": 3}}, "unknown training key 'batchsize'; did you mean 'batch_size'?"),
        ({"training": {"stride": 0}}, "training key 'stride' is 0; it must be at least 1"),
        ({"training": {"epochs": 1.5}}, "'epochs' is 1.5; it must be a whole number"),
        ({"training": {"epochs": True}}, "'epochs' is True; it must be a whole number"),
        ({"training": {"epochs": [1]}}, "'epochs' is [1]; it must be a whole number"),
        ({"training": {"fp16": "yes"}}, "'fp16' is 'yes'; it must be true or false"),
        ({"training": {"raw_data_path": 3}}, "'raw_data_path' is 3; it must be a string or a list of strings"),
        ({"training": {"raw_data_path": ["a", 3]}}, "'raw_data_path' is ['a', 3]; it must be a string or a list"),
        ({"training": {"raw_data_path": []}}, "'raw_data_path' is ; it must be a path"),
        ({"training": {"output_dir": 3}}, "'output_dir' is 3; it must be a string"),
        ({"training": {"resume": True}}, "'resume' belongs on the command line"),
        ({"training": 3}, "the value of 'training' must be an object"),
        ({"model": {}, "trainig": {}}, "unknown key 'trainig'"),
        ([], "must be a JSON object"),
        ('{"model": {"a": 1,\n  }}', "invalid JSON at line 2 column"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"model": {"a": 1, "b": 0, "a": 2}}', "'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "invalid JSON"),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line(content: Any, fragment: str) -> None:
    with pytest.raises(InputError) as error:
        parse_arguments(["--model_config", config(content)])
    assert str(error.value).startswith("c.json: ")
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_file_that_is_no_utf8() -> None:
    Path("c.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="invalid UTF-8 at byte 7"):
        read_config("c.json")


def test_whole_numbers_may_be_written_as_floats_in_a_file() -> None:
    arguments = parse_arguments(["--model_config", config({"training": {"max_steps": 2e3}})]).arguments
    assert arguments.max_steps == 2000
    assert isinstance(arguments.max_steps, int)


def test_every_default_passes_its_own_checks() -> None:
    for name, option in FIELDS.items():
        if option.default is not None:
            assert all(check(option.default) is None for check in option.metadata["checks"]), name
