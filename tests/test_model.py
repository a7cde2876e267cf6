"""The model: exact causality in its observable forms, and its life inside transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM, ReformerLMModel

EXACT = {"rtol": 0.0, "atol": 1e-9}


def make_model(**options: object) -> ReformerLMForCausalLM:
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
    }
    return ReformerLMForCausalLM(ReformerLMConfig(**defaults | options)).double().eval()


def tokens_like(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


VARIANTS = [
    {},
    {"position_type": "rotary", "key_norm": "unit", "ff_activation": "geglu"},
    {"position_type": "absolute", "norm_type": "scalenorm", "num_local_heads": 0, "num_shifted_heads": 2},
    {"position_type": "sinusoidal", "norm_type": "rezero", "num_local_heads": 4, "tie_word_embeddings": False},
    {"full_attention_threshold": 20, "local_keys": "shared", "local_rotary": False, "embedding_size": 10},
    {"position_type": "none", "lsh_window": 3, "num_local_heads": [4, 1], "num_mem_kv": 2},
    {"lsh_window": 20, "num_local_heads": 0, "allow_duplicate_attention": False, "full_attention_threshold": 9},
    {"num_buckets": 300, "num_hashes": 3, "ff_chunk_size": 5, "local_window": 3, "lm_head_bias": True},
    {"share_layer_weights": True, "one_value_head": True, "num_mem_kv": 2, "key_norm": "rms_eps"},
    {"merge_streams": "concatenate", "num_buckets": [2, 6, 4], "attention_output_bias": False},
    {"product_key_layers": [1], "product_keys": 12, "ff_chunk_size": 7},
    {"merge_streams": "concatenate", "tie_word_embeddings": False, "unit_output_vectors": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 300), cut=st.integers(1, 300), seed=st.integers(0, 1000))
def test_a_prefix_has_the_logits_it_has_in_the_whole(
    options: dict[str, object], length: int, cut: int, seed: int
) -> None:
    model = make_model(**options)
    x = tokens_like(1, length, seed)
    cut = min(cut, length)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :cut]).logits, model(x).logits[:, :cut], **EXACT)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_changing_the_future_changes_nothing_before(options: dict[str, object]) -> None:
    model = make_model(**options)
    x = tokens_like(2, 150, 0)
    changed = x.clone()
    changed[:, 90:] = tokens_like(2, 60, 1)
    with torch.no_grad():
        before, after = model(x).logits, model(changed).logits
    assert not torch.equal(before[:, 90:], after[:, 90:])
    torch.testing.assert_close(before[:, :90], after[:, :90], **EXACT)


def test_no_gradient_flows_to_the_past_from_the_future() -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(tokens_like(1, 100, 0)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 60].sum().backward()
    assert embeds.grad[0, :61].abs().sum(-1).min() > 0
    assert torch.equal(embeds.grad[0, 61:], torch.zeros_like(embeds.grad[0, 61:]))


@pytest.mark.parametrize("options", [*VARIANTS, {"lsh_mask": "chunked"}], ids=str)
def test_batch_row_order_changes_nothing(options: dict[str, object]) -> None:
    model = make_model(**options)
    x = tokens_like(3, 70, 0)
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(model(x[[2, 0, 1]]).logits, expected[[2, 0, 1]], **EXACT)
        torch.testing.assert_close(model(x[1:2]).logits, expected[1:2], **EXACT)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_padding_on_either_side_changes_nothing(
    options: dict[str, object], lengths: list[int], left: int, right: int, seed: int
) -> None:
    model = make_model(**options)
    width = left + max(lengths) + right
    x = tokens_like(len(lengths), width, seed)
    mask = torch.zeros_like(x)
    begins = [left if row % 2 else width - right - length for row, length in enumerate(lengths)]
    for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        mask[row, begin : begin + length] = 1
    with torch.no_grad():
        padded = model(x, attention_mask=mask).logits
        for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            alone = model(x[row : row + 1, begin : begin + length]).logits[0]
            torch.testing.assert_close(padded[row, begin : begin + length], alone, **EXACT)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_packed_documents_get_what_they_get_alone(options: dict[str, object], lengths: list[int], seed: int) -> None:
    model = make_model(**options)
    x = tokens_like(1, sum(lengths), seed)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    with torch.no_grad():
        packed = model(x, document_ids=documents).logits
        # In a batch, beside a row of another cut and with padding in front.
        both = torch.cat((x, x))
        other = torch.stack((documents[0], torch.zeros_like(documents[0])))
        mask = torch.ones_like(both)
        mask[1, : min(lengths[0], x.shape[1] - 1)] = 0
        batched = model(both, document_ids=other, attention_mask=mask).logits[:1]
    torch.testing.assert_close(batched, packed, **EXACT)
    begin = 0
    with torch.no_grad():
        for length in lengths:
            alone = model(x[:, begin : begin + length]).logits
            torch.testing.assert_close(packed[:, begin : begin + length], alone, **EXACT)
            begin += length


def test_packed_documents_in_chunked_mode_read_their_own_document_only() -> None:
    model = make_model(lsh_mask="chunked")
    documents = torch.tensor([[0] * 30 + [1] * 34])
    embeds = model.get_input_embeddings()(tokens_like(1, 64, 0)).detach().requires_grad_()
    model(inputs_embeds=embeds, document_ids=documents).logits[0, 30:].sum().backward()
    assert torch.equal(embeds.grad[0, :30], torch.zeros_like(embeds.grad[0, :30]))
    assert embeds.grad[0, 30].abs().sum() > 0


def test_wrong_masks_and_contexts_are_refused() -> None:
    model = make_model()
    x = tokens_like(1, 8, 0)
    for name, value in {
        "input_attn_mask": torch.ones(1, 8, 8, dtype=torch.bool),
    }.items():
        with pytest.raises(ValueError, match=f'{name} needs lsh_mask="chunked"'):
            model(x, **{name: value})
    chunked = make_model(lsh_mask="chunked")
    with pytest.raises(ValueError, match="keys has shape"):
        chunked(x, keys=torch.zeros(1, 3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="context_mask must be given with keys"):
        chunked(x, context_mask=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("lsh_mask", ["chunked", "causal"])
@pytest.mark.parametrize("threshold", [0, 15, 1000])
def test_a_context_is_seen_with_gradients_and_its_padding_is_not(threshold: int, lsh_mask: str) -> None:
    model = make_model(lsh_mask=lsh_mask, num_mem_kv=2, full_attention_threshold=threshold)
    x = tokens_like(2, 40, 0)
    context = torch.randn(2, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    results = []
    for reversible_threshold in (0, 1000):
        model.reformer.stack.reversible_threshold = reversible_threshold
        leaf = context.clone().requires_grad_()
        model.zero_grad()
        model(x, keys=leaf, context_mask=mask, labels=x).loss.backward()
        memory = model.reformer.stack.layers[0].attention.memory
        results.append([leaf.grad, memory.grad.clone()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    gradient, of_memory = results[0]
    assert of_memory.abs().sum() > 0
    assert torch.equal(gradient[1, 4:], torch.zeros_like(gradient[1, 4:]))
    assert gradient[0].abs().sum(-1).min() > 0


def test_same_input_same_output_whatever_the_global_seed() -> None:
    model = make_model()
    x = tokens_like(2, 100, 0)
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(x).logits
        torch.manual_seed(2)
        assert torch.equal(model(x).logits, first)
        state = torch.get_rng_state()
        model(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_hash_seed_and_layer_choose_the_rotations() -> None:
    rotations = [
        layer.attention.rotations(40, None, torch.device("cpu"))[0]
        for seed in (0, 1)
        for layer in make_model(hash_seed=seed).reformer.stack.layers
    ]
    assert len({rotation.sum().item() for rotation in rotations}) == 4


def test_rehash_per_step_counts_training_steps_only() -> None:
    model = make_model(rehash="step")
    x = tokens_like(1, 200, 0)
    with torch.no_grad():
        fixed = model(x).logits
        model.train()
        steps = [model(x).logits for _ in range(2)]
        assert not torch.equal(steps[0], steps[1])
        assert model.reformer.hash_step == 2
        model.reformer.hash_step = 0
        assert torch.equal(model(x).logits, steps[0])
        model.eval()
        assert torch.equal(model(x).logits, fixed)
        assert model.reformer.hash_step == 1


def test_rows_of_padding_only_and_masks_with_holes() -> None:
    model = make_model()
    x = tokens_like(2, 12, 0)
    mask = torch.ones_like(x)
    mask[0] = 0
    mask[1, [3, 7]] = 0
    with torch.no_grad():
        logits = model(x, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        alone = model(x[1:, mask[1].bool()]).logits[0]
    torch.testing.assert_close(logits[1, mask[1].bool()], alone, **EXACT)


def test_position_ids_are_used() -> None:
    model = make_model()
    x = tokens_like(2, 20, 0)
    ids = torch.arange(20).repeat(2, 1)
    with torch.no_grad():
        assert torch.equal(model(x, position_ids=ids).logits, model(x).logits)
        assert not torch.equal(model(x, position_ids=ids + 3).logits, model(x).logits)


def test_loss_is_the_shifted_cross_entropy() -> None:
    model = make_model()
    x = tokens_like(2, 50, 0)
    labels = x.clone()
    labels[0, 10:20] = -100
    out = model(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
    summed = model(x, labels=labels, num_items_in_batch=7).loss * 7
    torch.testing.assert_close(summed, expected * (labels[:, 1:] != -100).sum(), rtol=1e-10, atol=0)
    model.train()
    trained = model(x, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, expected, rtol=1e-10, atol=0)
    assert model(x, labels=labels, skip_logits=False).logits is not None


def test_labels_that_are_shifted_already() -> None:
    model = make_model()
    x = tokens_like(2, 51, 0)
    expected = model(x, labels=x).loss
    targets = x[:, 1:].clone()
    torch.testing.assert_close(model(x[:, :-1], shift_labels=targets).loss, expected, **EXACT)
    # As transformers' own models are called, where only the presence of labels counts.
    torch.testing.assert_close(model(x[:, :-1], labels=x[:, :-1], shift_labels=targets).loss, expected, **EXACT)
    mask = torch.ones_like(targets)
    mask[0, 30:] = 0
    targets[0, 29:] = -100
    kept = x.clone()
    kept[0, 30:] = -100
    torch.testing.assert_close(
        model(x[:, :-1], attention_mask=mask, shift_labels=targets).loss, model(x, labels=kept).loss, **EXACT
    )
    with pytest.raises(ValueError, match="shift_labels has shape"):
        model(x, shift_labels=targets)


def test_padding_never_counts_in_the_loss() -> None:
    model = make_model()
    x = tokens_like(1, 30, 0)
    expected = model(x, labels=x).loss
    for pads in ((5, 0), (0, 5), (3, 4)):
        padded = torch.nn.functional.pad(x, pads, value=7)
        mask = torch.nn.functional.pad(torch.ones_like(x), pads)
        torch.testing.assert_close(model(padded, attention_mask=mask, labels=padded).loss, expected, **EXACT)


def test_logits_to_keep() -> None:
    model = make_model()
    x = tokens_like(2, 20, 0)
    with torch.no_grad():
        whole = model(x).logits
        torch.testing.assert_close(model(x, logits_to_keep=3).logits, whole[:, -3:], **EXACT)
        index = torch.tensor([0, 5])
        torch.testing.assert_close(model(x, logits_to_keep=index).logits, whole[:, index], **EXACT)


def test_hidden_states_and_tuples() -> None:
    model = make_model()
    x = tokens_like(2, 20, 0)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    out = model(x, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert all(state.shape == (2, 20, 24) for state in out.hidden_states)
    torch.testing.assert_close(out.hidden_states[-1], model.reformer(x, attention_mask=mask)[0], **EXACT)
    torch.testing.assert_close(out.logits, model(x, attention_mask=mask).logits, **EXACT)
    assert isinstance(model(x, return_dict=False), tuple)


def test_clear_errors() -> None:
    model = make_model()
    x = tokens_like(1, 321, 0)
    with pytest.raises(ValueError, match="321 tokens, more than max_position_embeddings"):
        model(x)
    # Padding does not count.
    mask = torch.ones_like(x)
    mask[0, 0] = 0
    assert model(x, attention_mask=mask).logits.shape[1] == 321
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="empty"):
        model(x[:, :0])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(x[:, :5], attention_mask=mask)
    with pytest.raises(ValueError, match="labels has shape"):
        model(x[:, :5], labels=x[:, :6])


@pytest.mark.parametrize("position_type", ["axial", "absolute"])
def test_initial_weights(position_type: str) -> None:
    config = ReformerLMConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, position_type=position_type
    )
    for name, parameter in ReformerLMForCausalLM(config).named_parameters():
        if name.endswith("output.weight"):
            std = 0.02 / math.sqrt(8)
        elif "position_embedding" in name:
            std = 0.005
        elif "token_embedding" in name:
            std = 1 / 16
        elif parameter.dim() > 1:
            std = 0.02
        elif name == "reformer.norm.weight":
            assert sorted(parameter.unique().tolist()) == [-1.0, 1.0]
            continue
        else:
            expected = 1.0 if "norm.weight" in name else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
            continue
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameter.mean().item()) < std / 10, name


def test_gradients_on_several_threads_are_the_same_to_the_last_bit() -> None:
    config = ReformerLMConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(config)
    x = torch.randint(0, 50, (1, 4096))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(4):
            model.zero_grad()
            model(x, labels=x).loss.backward()
            runs.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert not [name for name, gradient in run.items() if not torch.equal(gradient, runs[0][name])]


def test_a_new_model_knows_nothing() -> None:
    config = ReformerLMConfig(vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    x = torch.randint(0, 2000, (1, 1000), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert ReformerLMForCausalLM(config).eval()(x, labels=x).loss.item() == pytest.approx(math.log(2000), rel=0.1)
    config.tie_word_embeddings = False
    assert (ReformerLMForCausalLM(config).reformer.norm.weight == 1).all()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "norm_type": "rezero"}], ids=str)
def test_save_and_load(options: dict[str, object], tmp_path: Path) -> None:
    model = make_model(**options).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    x = tokens_like(1, 40, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ReformerLMForCausalLM)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (not options)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, ReformerLMModel)
    assert torch.equal(base(x).last_hidden_state, model.reformer(x).last_hidden_state)


def test_shared_weights_are_there_once(tmp_path: Path) -> None:
    model = make_model(share_layer_weights=True, num_hidden_layers=3, num_mem_kv=2, tie_word_embeddings=False).float()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if ".layers.1.attention." in name or ".layers.2.feed_forward." in name]
    assert model.state_dict().keys() == set(names)
    layers = model.reformer.stack.layers
    assert layers[2].attention.query_key is layers[0].attention.query_key
    assert layers[2].feed_forward is layers[0].feed_forward
    # The rotations are not shared.
    rotations = [layer.attention.rotations(4, None, torch.device("cpu"))[0] for layer in layers]
    assert not torch.equal(rotations[0], rotations[1])
    x = tokens_like(2, 40, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (again, loaded):
        assert torch.equal(other(x).logits, model(x).logits)
        assert other.reformer.stack.layers[1].attention.value is other.reformer.stack.layers[0].attention.value
        assert other.reformer.stack.layers[1].attention.value is not layers[0].attention.value


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_buckets": [4, 3]}, "num_buckets"),
        ({"num_buckets": []}, "num_buckets"),
        ({"merge_streams": "sum"}, "merge_streams"),
        ({"key_norm": "l2"}, "key_norm"),
        ({"share_layer_weights": True, "num_local_heads": [1, 2]}, "num_local_heads"),
        ({"product_keys": 0}, "product_keys"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=.* is not possible"):
        make_model(**options)


def test_generate_greedy_batched_equals_single() -> None:
    model = make_model()
    prompts = [tokens_like(1, 5, 0), tokens_like(1, 9, 1)]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(p, attention_mask=torch.ones_like(p), **options)[0, p.shape[1] :] for p in prompts]
    batch = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(together, torch.stack(alone))
    # And greedy means the best token of the full forward at each step.
    tokens = prompts[0]
    for expected in alone[0]:
        best = model(tokens).logits[0, -1].argmax()
        assert best == expected
        tokens = torch.cat((tokens, best.view(1, 1)), dim=1)


def test_generate_with_beams_and_sampling() -> None:
    model = make_model()
    prompt = tokens_like(1, 5, 0)
    beams = model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, 11)
    torch.manual_seed(5)
    first = model.generate(prompt, max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=0)
    torch.manual_seed(5)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=0), first
    )
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_trainer_of_transformers_lowers_the_loss(tmp_path: Path) -> None:
    model = make_model(initializer_range=0.02).float()
    row = tokens_like(1, 40, 0)[0]
    dataset = [{"input_ids": row, "labels": row}] * 8
    before = model(row[None], labels=row[None]).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()
    assert model(row[None], labels=row[None]).loss.item() < before / 2


def test_whole_model_in_bfloat16_keeps_float32_streams() -> None:
    model = make_model(initializer_range=0.05).float()
    x = tokens_like(1, 100, 0)
    exact = model(x, labels=x).loss.item()
    low = model.to(torch.bfloat16)
    loss = low(x, labels=x).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in low.parameters())
