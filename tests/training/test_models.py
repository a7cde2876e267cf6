import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.errors import InputError
from reformer_lm.text import load_tokenizer
from reformer_lm.training.config_files import ConfigFile
from reformer_lm.training.models import ModelSource, build_config, choose_model, load_model, save_model

SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bucket_size": 4,
}


def file_of(**changes: Any) -> ConfigFile:
    return ConfigFile("c.json", {**SETTINGS, **changes}, {})


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    source = choose_model(file_of(), True, None, tokenizer)
    folder = tmp_path / "saved"
    save_model(folder, load_model(source, tokenizer), tokenizer)
    return folder


def test_tokenizer_gives_size_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_config(SETTINGS, "c.json", tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert config.hidden_size == 16
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 3)


def test_every_key_of_a_saved_config_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    saved = json.loads(ReformerLMConfig(vocab_size=len(tokenizer), **SETTINGS).to_json_string(use_diff=False))
    assert build_config(saved, "c.json", tokenizer).hidden_size == 16


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hiden_size": 8}, "unknown model key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"n_embd": 8}, "unknown model key 'n_embd'; here it is called 'hidden_size'"),
        ({"batch_size": 8}, "'batch_size' is a training option: put it into a part \"training\""),
        ({"model_type": "gpt5"}, "no causal language model of model_type 'gpt5'"),
        ({"vocab_size": 3}, "vocab_size is 3, but the tokenizer has"),
        ({"num_attention_heads": 3}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"axial_shape": 3}, "c.json: "),
        ({"hidden_dropout_prob": "much"}, "c.json: "),
    ],
)
def test_impossible_settings_are_named_in_one_line(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(InputError) as error:
        build_config({**SETTINGS, **changes}, "c.json", tokenizer)
    assert str(error.value).startswith("c.json: ")
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_saved_folder_is_complete_for_other_tools(saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model, ReformerLMForCausalLM)
    assert AutoTokenizer.from_pretrained(saved).encode("春天") == tokenizer.encode("春天")
    generation = GenerationConfig.from_pretrained(saved)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 1, 3)
    assert generation.do_sample
    modes = {path.stat().st_mode for path in saved.iterdir()}
    assert len(modes) == 1


def test_weights_come_back_in_float32(saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(choose_model(None, False, saved, tokenizer), tokenizer)
    model.half().save_pretrained(saved)
    again = load_model(choose_model(None, False, saved, tokenizer), tokenizer)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("tie", [True, False])
def test_folder_with_the_same_shapes_is_accepted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tie: bool) -> None:
    file = file_of(tie_word_embeddings=tie)
    folder = tmp_path / "saved"
    save_model(folder, load_model(choose_model(file, True, None, tokenizer), tokenizer), tokenizer)
    assert choose_model(file, True, folder, tokenizer).folder == folder
    # What changes no shape may be chosen anew.
    changed = choose_model(file_of(tie_word_embeddings=tie, hidden_dropout_prob=0.5), True, folder, tokenizer)
    assert changed.config.hidden_dropout_prob == 0.5
    # The default file does not count against the folder's own.
    assert choose_model(file_of(hidden_size=32), False, folder, tokenizer).config.hidden_size == 16
    with pytest.raises(InputError, match="tie_word_embeddings"):
        choose_model(file_of(tie_word_embeddings=not tie), True, folder, tokenizer)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 32}, {"num_hidden_layers": 2}, {"embedding_size": 8}, {"max_position_embeddings": 32}],
    ids=str,
)
def test_folder_with_other_shapes_is_refused(
    saved: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="a checkpoint of another shape") as error:
        choose_model(file_of(**changes), True, saved, tokenizer)
    name, value = next(iter(changes.items()))
    assert f"{name} " in str(error.value)
    assert f"{value} here" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_another_vocabulary_is_refused(saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    other = load_tokenizer()
    with pytest.raises(InputError, match=f"vocabulary of {len(tokenizer)} tokens, but the tokenizer has {len(other)};"):
        choose_model(None, False, saved, other)


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut weights", "cut config", "list config"])
def test_damaged_folders_are_refused_in_one_line(saved: Path, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    weights, config = saved / "model.safetensors", saved / "config.json"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        config.write_text("{" if damage == "cut config" else "[]")
    with pytest.raises(InputError) as error:
        choose_model(None, False, saved, tokenizer)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_seed_decides_the_initial_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    source = ModelSource(build_config(SETTINGS, "c.json", tokenizer), None)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.cat([p.detach().flatten() for p in load_model(source, tokenizer).parameters()]))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
