"""Masked language model and classifiers: losses, padding, attention weights, and their life inside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from reformer_lm import (
    ReformerLMConfig,
    ReformerLMForCausalLM,
    ReformerLMForMaskedLM,
    ReformerLMForSequenceClassification,
    ReformerLMForTokenClassification,
    record_attention,
)

EXACT = {"rtol": 0.0, "atol": 1e-9}
BIDIRECTIONAL = {"lsh_mask": "chunked", "causal": False}
HEADS = [ReformerLMForSequenceClassification, ReformerLMForTokenClassification]
CLASSES = {
    ReformerLMForMaskedLM: AutoModelForMaskedLM,
    ReformerLMForSequenceClassification: AutoModelForSequenceClassification,
    ReformerLMForTokenClassification: AutoModelForTokenClassification,
}


def make_model(kind: type[PreTrainedModel], **options: object) -> Any:
    torch.manual_seed(0)
    defaults: dict[str, object] = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 320,
        "bucket_size": 8,
        "num_hashes": 2,
        "initializer_range": 0.4,
        "num_labels": 3,
    }
    if kind is ReformerLMForMaskedLM:
        defaults |= BIDIRECTIONAL
    return kind(ReformerLMConfig(**defaults | options)).double().eval()


def tokens_like(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


VARIANTS: list[dict[str, object]] = [
    {},
    BIDIRECTIONAL,
    BIDIRECTIONAL | {"position_type": "rotary", "num_local_heads": 0, "attn_chunks": 2},
    BIDIRECTIONAL | {"num_mem_kv": 3, "full_attention_threshold": 20, "local_keys": "shared"},
    BIDIRECTIONAL | {"num_buckets": 6, "allow_duplicate_attention": False, "num_local_heads": 1},
    BIDIRECTIONAL | {"num_local_heads": 4, "norm_type": "rezero"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_padding_and_neighbours_change_nothing(
    options: dict[str, object], lengths: list[int], left: int, right: int, seed: int
) -> None:
    model = make_model(ReformerLMForSequenceClassification, **options)
    tagger = make_model(ReformerLMForTokenClassification, **options)
    width = left + max(lengths) + right
    x = tokens_like(len(lengths), width, seed)
    mask = torch.zeros_like(x)
    begins = [left if row % 2 else width - right - length for row, length in enumerate(lengths)]
    for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        mask[row, begin : begin + length] = 1
    with torch.no_grad():
        padded, tags = model(x, attention_mask=mask).logits, tagger(x, attention_mask=mask).logits
        for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            alone = x[row : row + 1, begin : begin + length]
            torch.testing.assert_close(padded[row], model(alone).logits[0], **EXACT)
            torch.testing.assert_close(tags[row, begin : begin + length], tagger(alone).logits[0], **EXACT)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_of_padded_rows_are_those_of_each_alone_reversibly_or_not(options: dict[str, object]) -> None:
    model = make_model(ReformerLMForTokenClassification, **options)
    x = tokens_like(4, 40, 0)
    lengths = [40, 17, 17, 3]
    mask = torch.arange(40) < torch.tensor(lengths).unsqueeze(1)
    weights = torch.linspace(-1, 1, 4 * 40 * 3, dtype=torch.float64).view(4, 40, 3).sin()
    found = []
    for threshold in (0, 1000):
        model.reformer.stack.reversible_threshold = threshold
        model.zero_grad()
        (model(x, attention_mask=mask).logits * weights)[mask].sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for row, length in enumerate(lengths):
        (model(x[row : row + 1, :length]).logits * weights[row : row + 1, :length]).sum().backward()
    found.append([p.grad for p in model.parameters()])
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, **EXACT)
        torch.testing.assert_close(two, three, **EXACT)


def test_what_each_kind_of_model_reads() -> None:
    x = tokens_like(2, 20, 0)
    mask = torch.ones_like(x)
    mask[0, 13:] = 0
    mask[1, :4] = 0
    causal = make_model(ReformerLMForSequenceClassification)
    hidden = causal.reformer(x, attention_mask=mask).last_hidden_state
    expected = causal.score(torch.stack((hidden[0, 12], hidden[1, 19])))
    torch.testing.assert_close(causal(x, attention_mask=mask).logits, expected, **EXACT)
    both = make_model(ReformerLMForSequenceClassification, **BIDIRECTIONAL)
    hidden = both.reformer(x, attention_mask=mask).last_hidden_state
    expected = both.score(torch.stack((hidden[0, :13].mean(dim=0), hidden[1, 4:].mean(dim=0))))
    torch.testing.assert_close(both(x, attention_mask=mask).logits, expected, **EXACT)
    nothing = both(x, attention_mask=torch.zeros_like(x)).logits
    torch.testing.assert_close(nothing, both.score.bias.expand(2, -1), **EXACT)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem_type"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (1, torch.tensor([[0.5], [-1.0], [2.0]]), "regression"),
        (1, torch.tensor([1, 0, 2]), "regression"),
        (3, torch.tensor([2, 0, 1]), "single_label_classification"),
        (3, torch.tensor([2, -100, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), "multi_label_classification"),
    ],
    ids=str,
)
def test_losses_of_a_sequence_are_torchs(num_labels: int, labels: Tensor, problem_type: str) -> None:
    model = make_model(ReformerLMForSequenceClassification, num_labels=num_labels)
    x = tokens_like(3, 12, 0)
    out = model(x, labels=labels)
    assert model.config.problem_type == problem_type
    if problem_type == "regression":
        expected = functional.mse_loss(out.logits.squeeze(-1), labels.view(3).double())
    elif problem_type == "single_label_classification":
        expected = functional.cross_entropy(out.logits, labels)
    else:
        expected = functional.binary_cross_entropy_with_logits(out.logits, labels.double())
    torch.testing.assert_close(out.loss, expected, **EXACT)
    assert isinstance(model(x, labels=labels, return_dict=False), tuple)


def test_regression_of_several_numbers_and_wrong_labels() -> None:
    model = make_model(ReformerLMForSequenceClassification, problem_type="regression")
    x, labels = tokens_like(2, 9, 0), torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    out = model(x, labels=labels)
    torch.testing.assert_close(out.loss, functional.mse_loss(out.logits, labels.double()), **EXACT)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\), expected \(2, 3\)"):
        model(x, labels=torch.tensor([1.0, 2.0]))
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="problem_type='ranking' is not possible"):
        model(x, labels=labels)


@pytest.mark.parametrize("kind", [ReformerLMForMaskedLM, ReformerLMForTokenClassification])
def test_losses_of_tokens_are_torchs_with_their_gradients(kind: type[PreTrainedModel]) -> None:
    model = make_model(kind)
    x = tokens_like(2, 30, 0)
    mask = torch.ones_like(x)
    mask[0, 25:] = 0
    labels = torch.randint(0, 3, (2, 30), generator=torch.Generator().manual_seed(1))
    labels[1, 3:20] = -100
    out = model(x, attention_mask=mask, labels=labels)
    counted = labels.masked_fill(mask == 0, -100)
    expected = functional.cross_entropy(out.logits.flatten(0, 1), counted.flatten())
    torch.testing.assert_close(out.loss, expected, **EXACT)
    summed = model(x, attention_mask=mask, labels=labels, num_items_in_batch=7).loss * 7
    torch.testing.assert_close(summed, expected * (counted != -100).sum(), **EXACT)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    found = torch.autograd.grad(model(x, attention_mask=mask, labels=labels).loss, parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    # Labels that do not count may be anything.
    with_others = torch.where(mask == 0, torch.randint_like(labels, 3), labels)
    torch.testing.assert_close(model(x, attention_mask=mask, labels=with_others).loss, out.loss, **EXACT)
    with pytest.raises(ValueError, match="labels has shape"):
        model(x, labels=labels[:, :5])


def test_a_masked_model_in_training_forms_no_logits() -> None:
    model = make_model(ReformerLMForMaskedLM)
    x = tokens_like(2, 30, 0)
    labels = x.masked_fill(torch.arange(30) % 5 != 0, -100)
    whole = model(x, labels=labels)
    assert whole.logits.shape == (2, 30, 31)
    trained = model.train()(x, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, whole.loss, **EXACT)
    assert model(x, labels=labels, skip_logits=False).logits is not None


def test_embeddings_in_place_of_tokens() -> None:
    x = tokens_like(2, 30, 0)
    mask = torch.ones_like(x)
    mask[0, 20:] = 0
    for kind in CLASSES:
        model = make_model(kind)
        embeds = model.get_input_embeddings()(x)
        torch.testing.assert_close(
            model(inputs_embeds=embeds, attention_mask=mask).logits, model(x, attention_mask=mask).logits, **EXACT
        )


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_hidden_states_and_attention_weights(options: dict[str, object]) -> None:
    model = make_model(ReformerLMForTokenClassification, **options)
    x = tokens_like(2, 30, 0)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    out = model(x, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, model(x, attention_mask=mask).logits, **EXACT)
    assert [state.shape for state in out.hidden_states] == [(2, 30, 24)] * 3
    memory = int(options.get("num_mem_kv", 0))
    assert [weights.shape for weights in out.attentions] == [(2, 4, 30, 30 + memory)] * 2
    for weights in out.attentions:
        # Padding reads nothing and is read by nobody.
        assert not weights[0, :, :4].any() and not weights[0, :, :, :4].any()
        sums = weights.sum(dim=-1)
        sums[0, :, :4] = 1.0
        # Heads with value shift read nothing where they match nothing.
        ones = (sums - 1).abs() < 1e-9
        assert (ones | (sums.abs() < 1e-9)).all()
        assert ones.double().mean() > 0.8
        if model.config.causal:
            assert torch.equal(weights, weights.tril())
        else:
            assert weights[..., :30].triu(1).any()
    # The row without padding has the weights it has alone.
    with record_attention(model) as records:
        model(x[1:])
    for weights, record in zip(out.attentions, records, strict=True):
        torch.testing.assert_close(weights[1:], record.weights, **EXACT)
    assert model(x, output_attentions=False).attentions is None
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 3


def test_attention_weights_of_a_language_model_and_its_cache() -> None:
    model = make_model(ReformerLMForCausalLM)
    x = tokens_like(1, 12, 0)
    out = model(x, output_attentions=True, use_cache=True)
    assert [weights.shape for weights in out.attentions] == [(1, 4, 12, 12)] * 2
    torch.testing.assert_close(out.attentions[0], model(x, output_attentions=True).attentions[0], **EXACT)
    with pytest.raises(ValueError, match="output_attentions cannot be used with a cache that holds tokens"):
        model(x[:, :1], past_key_values=out.past_key_values, output_attentions=True)


@pytest.mark.parametrize("options", [{}, {"embedding_size": 10}], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_save_load_and_auto_classes(kind: type[PreTrainedModel], options: dict[str, object], tmp_path: Path) -> None:
    model = make_model(kind, **options).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    x = tokens_like(1, 40, 0)
    loaded = CLASSES[kind].from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(loaded(x).logits, model(x).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(x).last_hidden_state, model.reformer(x).last_hidden_state)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("saved_as", ["language model", "base model"])
def test_weights_of_a_causal_model_load_into_each_head(
    kind: type[PreTrainedModel], saved_as: str, tmp_path: Path
) -> None:
    causal = make_model(ReformerLMForCausalLM).float()
    (causal if saved_as == "language model" else causal.reformer).save_pretrained(tmp_path)
    options: dict[str, object] = {"num_labels": 5}
    if kind is ReformerLMForMaskedLM:
        options = BIDIRECTIONAL | {"num_shifted_heads": 0}
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True, **options)
    theirs = causal.reformer.state_dict()
    for name, tensor in model.reformer.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert all(name.startswith("score.") for name in report["missing_keys"])
    x = tokens_like(2, 20, 0)
    logits = model(x).logits
    assert torch.isfinite(logits).all()
    if kind is ReformerLMForMaskedLM:
        assert torch.equal(model.lm_head.weight, causal.lm_head.weight)
        with pytest.raises(ValueError, match="causal=False"):
            kind.from_pretrained(tmp_path)
    else:
        assert logits.shape[-1] == 5
        torch.testing.assert_close(
            model.reformer(x).last_hidden_state, causal.reformer(x).last_hidden_state, rtol=0, atol=1e-6
        )


def test_a_bidirectional_model_is_no_language_model() -> None:
    config = ReformerLMConfig(**BIDIRECTIONAL)
    with pytest.raises(ValueError, match="needs causal=True"):
        ReformerLMForCausalLM(config)
    with pytest.raises(ValueError, match="needs causal=True"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_larger_vocabulary(kind: type[PreTrainedModel]) -> None:
    model = make_model(kind)
    x = tokens_like(1, 20, 0)
    before = model(x).logits
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == 40 and model.get_input_embeddings().weight.shape[0] == 40
    after = model(x).logits
    if kind is ReformerLMForMaskedLM:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert after.shape[-1] == 40
    torch.testing.assert_close(after[..., : before.shape[-1]], before, **EXACT)
    assert torch.isfinite(model(x + 9).logits).all()


@pytest.mark.parametrize("kind", HEADS)
def test_trainer_of_transformers_lowers_the_loss(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    model = make_model(kind, initializer_range=0.02).float()
    rows = tokens_like(8, 16, 0)
    labels = rows[:, 0] % 3 if kind is ReformerLMForSequenceClassification else rows % 3
    dataset = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    before = model(rows, labels=labels).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=25, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    trained = Trainer(model=model, args=arguments, train_dataset=dataset).train()
    # The mean over both halves of a batch, not their sum.
    assert trained.training_loss < before
    model.eval()
    assert model(rows, labels=labels).loss.item() < before / 2


def test_documents_in_one_row_are_masked_apart() -> None:
    model = make_model(ReformerLMForMaskedLM)
    documents = torch.tensor([[0] * 30 + [1] * 34])
    embeds = model.get_input_embeddings()(tokens_like(1, 64, 0)).detach().requires_grad_()
    model(inputs_embeds=embeds, document_ids=documents).logits[0, 30:].sum().backward()
    assert torch.equal(embeds.grad[0, :30], torch.zeros_like(embeds.grad[0, :30]))
    assert embeds.grad[0, 30].abs().sum() > 0
