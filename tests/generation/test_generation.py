"""Sampling: repeatable, independent of the batch, with no impossible tokens, streamed as it is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_lm.errors import InputError
from reformer_lm.generation import GenerationSettings, TextGenerator
from reformer_lm.generation.sampling import SeededSampling
from reformer_lm.generation.streaming import STREAMED_CONTEXT, ContinuationStreamer, continuation_text, first_stop
from reformer_lm.text import load_tokenizer

HANZI = "山水云风花雪月春夏秋冬天地人，。"
PAD, UNKNOWN, END, NEWLINE, BEGIN = range(5)
MAXIMUM = 64


def favour(model, token_ids, amount=50.0):
    with torch.no_grad():
        model.get_output_embeddings().bias[token_ids] += amount


PLAIN = GenerationSettings(length=12, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)


def texts_of(generator, prompts, **options):
    return [sample.text for sample in generator.generate(prompts, options.pop("settings", PLAIN), **options)]


# --- repeatable


def test_the_seed_decides_the_text(model, tokenizer):
    first = texts_of(TextGenerator(model, tokenizer, seed=1), ["山水"])
    again = texts_of(TextGenerator(model, tokenizer, seed=1), ["山水"])
    other = texts_of(TextGenerator(model, tokenizer, seed=2), ["山水"])
    assert first == again
    assert first != other


def test_samples_do_not_depend_on_their_batch(model, tokenizer):
    prompts = ["山水", "", "春夏秋冬天地人", "abc"]
    one_by_one = texts_of(TextGenerator(model, tokenizer, seed=5), prompts, samples=3, batch_size=1)
    for batch_size in (2, 5, 12, 100):
        batched = texts_of(TextGenerator(model, tokenizer, seed=5), prompts, samples=3, batch_size=batch_size)
        assert batched == one_by_one
    assert len(set(one_by_one)) == 12


def test_samples_do_not_depend_on_the_other_prompts(model, tokenizer):
    alone = texts_of(TextGenerator(model, tokenizer, seed=5), ["春夏"], samples=2)
    among_others = texts_of(TextGenerator(model, tokenizer, seed=5), ["山", "春夏", "人"], samples=2)
    assert among_others[2:4] == alone


def test_asking_again_gives_further_samples(model, tokenizer):
    generator = TextGenerator(model, tokenizer, seed=5)
    turns = [texts_of(generator, ["春夏"])[0] for _ in range(3)]
    assert turns == texts_of(TextGenerator(model, tokenizer, seed=5), ["春夏"], samples=3)
    assert len(set(turns)) == 3


def test_the_global_random_numbers_are_left_alone(model, tokenizer):
    before = torch.get_rng_state()
    texts_of(TextGenerator(model, tokenizer, seed=5), ["春夏"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_models_saved_sampling_settings_do_not_interfere(model, tokenizer, caplog):
    expected = texts_of(TextGenerator(model, tokenizer, seed=5), ["春夏"])
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, max_length=3, num_beams=2)
    saved = model.generation_config
    before = torch.get_rng_state()
    generator = TextGenerator(model, tokenizer, seed=5)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        # Beam search could not be streamed, and transformers' own sampling uses the global random numbers.
        assert texts_of(generator, ["春夏"], streamer=generator.streamer(lambda piece: None)) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert caplog.records == []
    assert model.generation_config is saved


def test_whole_numbers_are_numbers(model, tokenizer):
    settings = GenerationSettings(length=5, temperature=1, top_k=0, top_p=1, repetition_penalty=2)
    same = GenerationSettings(length=5, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=2.0)
    assert texts_of(TextGenerator(model, tokenizer, seed=5), ["春夏"], settings=settings) == texts_of(
        TextGenerator(model, tokenizer, seed=5), ["春夏"], settings=same
    )


def test_order_and_names_of_the_samples(model, tokenizer):
    generator = TextGenerator(model, tokenizer, seed=5)
    samples = list(generator.generate(["山", "水"], PLAIN, samples=2, batch_size=3))
    assert [(s.prompt, s.prompt_index, s.sample_index) for s in samples] == [
        ("山", 0, 0),
        ("山", 0, 1),
        ("水", 1, 0),
        ("水", 1, 1),
    ]
    assert all(s.tokens_per_second > 0 for s in samples)


# --- what is drawn


def test_likeliest_token_is_that_of_the_full_forward(model, tokenizer):
    greedy = GenerationSettings(length=20, top_k=1, repetition_penalty=1.0)
    (sample,) = TextGenerator(model, tokenizer, seed=0).generate(["山水"], greedy)
    tokens = [BEGIN, *tokenizer.encode("山水")]
    for step, drawn in enumerate(sample.token_ids):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[[PAD, UNKNOWN, BEGIN]] = -torch.inf
        if step == 0:
            logits[END] = -torch.inf
        assert drawn == logits.argmax().item()
        tokens.append(drawn)
    assert sample.finished or len(sample.token_ids) == 20


def test_tokens_that_are_no_text_are_never_drawn(tokenizer, build_model):
    # Four rows of the embedding belong to no token.
    padded = build_model(len(tokenizer) + 4)
    favour(padded, [PAD, UNKNOWN, BEGIN, *range(len(tokenizer), len(tokenizer) + 4)])
    samples = list(TextGenerator(padded, tokenizer, seed=0).generate(["", "山"], PLAIN, samples=4))
    drawn = {token for sample in samples for token in sample.token_ids}
    assert drawn
    assert drawn.isdisjoint({PAD, UNKNOWN, BEGIN})
    assert max(drawn) < len(tokenizer)


def test_the_end_of_the_article_stops_a_sample_but_not_its_neighbours(model, tokenizer):
    favour(model, [END], 2.5)
    settings = GenerationSettings(length=30, top_k=0, top_p=1.0, repetition_penalty=1.0)
    samples = list(TextGenerator(model, tokenizer, seed=3).generate(["山"], settings, samples=8))
    lengths = {len(sample.token_ids) for sample in samples}
    assert len(lengths) > 2
    for sample in samples:
        assert sample.finished == (len(sample.token_ids) < 30)
        assert END not in sample.token_ids
        assert "[" not in sample.text


def test_an_article_has_at_least_one_token(model, tokenizer):
    favour(model, [END])
    (sample,) = TextGenerator(model, tokenizer, seed=3).generate([""], PLAIN)
    assert len(sample.token_ids) == 1
    assert sample.finished


def test_repetition_penalty_avoids_used_tokens(model, tokenizer):
    strict = GenerationSettings(length=10, top_k=1, repetition_penalty=1e6)
    favour(model, slice(None), 20.0)
    (sample,) = TextGenerator(model, tokenizer, seed=3).generate(["山水"], strict)
    used = [*tokenizer.encode("山水"), *sample.token_ids]
    assert len(set(used)) == len(used)


def test_no_run_comes_twice(model, tokenizer):
    favour(model, [END], -50.0)
    settings = GenerationSettings(length=40, top_k=1, repetition_penalty=1.0, no_repeat_ngram=2)
    (sample,) = TextGenerator(model, tokenizer, seed=3).generate(["山水"], settings)
    tokens = [*tokenizer.encode("山水"), *sample.token_ids]
    pairs = list(itertools.pairwise(tokens))
    assert len(set(pairs)) == len(pairs)


def draw(probabilities, count, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    sampler = SeededSampling(generators, GenerationSettings(**{"top_k": 0, "top_p": 1.0, **options}))
    scores = torch.tensor(probabilities, dtype=torch.float32).log().expand(count, -1)
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), scores)
    assert torch.equal(drawn.isfinite().sum(dim=-1), torch.ones(count, dtype=torch.long))
    return torch.bincount(drawn.argmax(dim=-1), minlength=len(probabilities))


def test_frequencies_follow_the_probabilities():
    counts = draw([0.5, 0.0, 0.3, 0.2, 0.0], 4000)
    # Five standard deviations of a binomial count are at most 158.
    assert (counts - torch.tensor([2000, 0, 1200, 800, 0])).abs().max() < 158
    assert counts[1] == counts[4] == 0


def test_temperature_sharpens():
    counts = draw([0.6, 0.4], 4000, temperature=0.5)
    assert abs(counts[0].item() - 4000 * 0.36 / 0.52) < 158


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_p": 0.75}, {0, 2}),
        ({"top_p": 0.45}, {0}),
        ({"top_k": 1}, {0}),
        ({"min_p": 0.5}, {0, 2}),
        ({"min_p": 0.7}, {0}),
        # Surprisals 0.69, 1.20, 1.61; expected 1.03: the second is the most typical.
        ({"typical_p": 0.2}, {2}),
        ({}, {0, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(options, possible):
    counts = draw([0.5, 0.0, 0.3, 0.2], 400, **options)
    assert set(counts.nonzero().flatten().tolist()) == possible


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (0.2, 1), (0.3, 3), (1 - 2**-53, 3)])
def test_edges_of_the_random_numbers(monkeypatch, number, expected):
    monkeypatch.setattr(torch, "rand", lambda count, **options: torch.full((count,), number, dtype=torch.float64))
    assert draw([0.0, 0.25, 0.0, 0.75, 0.0], 1)[expected] == 1


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0]), min_size=1, max_size=50).filter(any),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_a_token_of_probability_zero_is_never_drawn(weights, seed):
    sampler = SeededSampling([torch.Generator().manual_seed(seed)], GenerationSettings(top_k=0, top_p=1.0))
    scores = torch.tensor([weights], dtype=torch.float64).log()
    assert weights[sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax().item()] > 0


# --- room in the model


def test_prompt_that_does_not_fit_is_refused_or_keeps_its_end(model, tokenizer):
    favour(model, [END], -50.0)
    notes = []
    generator = TextGenerator(model, tokenizer, seed=1, on_note=notes.append)
    long_prompt = "山水" * 50 + "春夏秋冬" * 8
    with pytest.raises(InputError, match=r"133 tokens .* 12 to be written, but the model reads 64"):
        generator.generate([long_prompt], PLAIN)
    slide = dataclasses.replace(PLAIN, overflow="slide")
    (sample,) = generator.generate([long_prompt], slide)
    # Half of 64 tokens are read: exactly the 32 last characters.
    assert len(notes) == 1
    assert "133" in notes[0]
    assert "32" in notes[0]
    assert len(sample.token_ids) == 12
    (other_beginning,) = TextGenerator(model, tokenizer, seed=1).generate(["花" * 99 + "春夏秋冬" * 8], slide)
    assert other_beginning.text == sample.text


def test_prompt_that_just_fits(model, tokenizer):
    generator = TextGenerator(model, tokenizer, seed=1)
    assert len(list(generator.generate(["山" * (MAXIMUM - 12 - 1)], PLAIN))) == 1
    with pytest.raises(InputError, match="write at most 11"):
        generator.generate(["山" * (MAXIMUM - 12)], PLAIN)


def test_sliding_text_goes_on_from_the_last_half(model, tokenizer):
    favour(model, [END], -50.0)
    greedy = GenerationSettings(length=150, top_k=1, repetition_penalty=1.0, overflow="slide")
    samples = list(TextGenerator(model, tokenizer, seed=0).generate(["山水云风", "天"], greedy, samples=2))
    for sample in samples:
        context = [BEGIN, *tokenizer.encode(sample.prompt)]
        for step, drawn in enumerate(sample.token_ids):
            if len(context) == MAXIMUM:
                context = context[-MAXIMUM // 2 :]
            logits = model(torch.tensor([context])).logits[0, -1]
            logits[[PAD, UNKNOWN, BEGIN]] = -torch.inf
            if step == 0:
                logits[END] = -torch.inf
            assert drawn == logits.argmax().item(), step
            context.append(drawn)
        assert len(sample.token_ids) == 150 and sample.finish_reason == "length"


# --- strings that end the text


@pytest.mark.parametrize("overflow", ["error", "slide"])
def test_text_ends_before_a_stop_string(model, tokenizer, overflow):
    favour(model, [END], -50.0)
    length = 40 if overflow == "error" else 150
    free = dataclasses.replace(PLAIN, length=length, overflow=overflow)
    prompts = ["山水", "春夏秋冬", "ab"]
    whole = texts_of(TextGenerator(model, tokenizer, seed=5), prompts, settings=free)
    stop = (whole[0][length // 2 : length // 2 + 2], whole[1][7], "no such text")
    stopped = list(TextGenerator(model, tokenizer, seed=5).generate(prompts, dataclasses.replace(free, stop=stop)))
    for text, sample in zip(whole, stopped, strict=True):
        ends = [text.find(string) for string in stop if string in text]
        assert sample.text == (text[: min(ends)] if ends else text)
        assert sample.finish_reason == ("stop" if ends else "length")
    assert stopped[0].finish_reason == stopped[1].finish_reason == "stop"


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stream_holds_back_what_may_become_a_stop_string(pieces, stop):
    written = []
    streamer = ContinuationStreamer(None, written.append, stop)
    for piece in pieces:
        streamer._add(piece)
        text = "".join(pieces)
        assert text.startswith("".join(written))
    streamer.end()
    assert "".join(written) == text_before(pieces, stop)


def text_before(pieces, stop):
    text = ""
    for piece in pieces:
        text += piece
        at = first_stop(text, stop)
        if at is not None:
            return text[:at]
    return text


@pytest.mark.parametrize("prompt", ["ab", "山水", ""])
def test_streamed_text_ends_before_a_stop_string(model, tokenizer, prompt):
    free = dataclasses.replace(PLAIN, length=40)
    (whole,) = texts_of(TextGenerator(model, tokenizer, seed=2), [prompt], settings=free)
    settings = dataclasses.replace(free, stop=(whole[8:10],))
    generator = TextGenerator(model, tokenizer, seed=2)
    pieces = []
    (sample,) = generator.generate([prompt], settings, streamer=generator.streamer(pieces.append, settings.stop))
    assert "".join(pieces) == sample.text == whole[: whole.index(whole[8:10])]


def test_longest_possible_text(endless_model, tokenizer):
    settings = GenerationSettings(length=MAXIMUM - 1)
    (sample,) = TextGenerator(endless_model, tokenizer, seed=1).generate([""], settings)
    assert len(sample.token_ids) == MAXIMUM - 1
    with pytest.raises(InputError, match=f"write at most {MAXIMUM - 1}"):
        TextGenerator(endless_model, tokenizer, seed=1).generate([""], GenerationSettings(length=MAXIMUM))


# --- streaming


def test_chinese_is_streamed_character_by_character(model, tokenizer):
    favour(model, [tokenizer.convert_tokens_to_ids(character) for character in HANZI], 50.0)
    pieces = []
    generator = TextGenerator(model, tokenizer, seed=4)
    (sample,) = generator.generate(["山水"], PLAIN, streamer=generator.streamer(pieces.append))
    assert len(sample.text) == 12
    assert pieces == list(sample.text)


@pytest.mark.parametrize("prompt", ["ab", "abc, de", "山水", "山\n", ""])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_streamed_pieces_add_up_to_the_text(model, tokenizer, prompt, seed):
    settings = GenerationSettings(length=40, top_k=0, top_p=1.0, repetition_penalty=1.0)
    pieces = []
    generator = TextGenerator(model, tokenizer, seed=seed)
    streamer = generator.streamer(pieces.append)
    (sample,) = generator.generate([prompt], settings, streamer=streamer)
    assert "".join(pieces) == sample.text
    # The same streamer serves the next turn.
    pieces.clear()
    (sample,) = generator.generate([prompt], settings, streamer=streamer)
    assert "".join(pieces) == sample.text


def test_streaming_does_not_change_the_text(model, tokenizer):
    generator = TextGenerator(model, tokenizer, seed=4)
    streamed = texts_of(generator, ["山水"], streamer=generator.streamer(lambda piece: None))
    assert streamed == texts_of(TextGenerator(model, tokenizer, seed=4), ["山水"])


def test_continuation_keeps_the_join_with_the_prompt(tokenizer):
    ids = tokenizer.encode("ab, cd e")
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        text = continuation_text(tokenizer, ids[max(0, cut - STREAMED_CONTEXT) : cut], ids[cut:])
        assert before + text == "ab, cd e"


# --- mistakes


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"typical_p": 0.0},
        {"no_repeat_ngram": -1},
        {"stop": ("。", "")},
        {"overflow": "wrap"},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        GenerationSettings(**options)


@pytest.mark.parametrize(("options", "named"), [({"samples": 0}, "samples"), ({"batch_size": 0}, "batch_size")])
def test_bad_counts_are_refused(model, tokenizer, options, named):
    with pytest.raises(InputError, match=named):
        TextGenerator(model, tokenizer, seed=0).generate(["山"], PLAIN, **options)


def test_only_one_sample_can_be_streamed(model, tokenizer):
    generator = TextGenerator(model, tokenizer, seed=0)
    with pytest.raises(InputError, match="single sample"):
        generator.generate(["山"], PLAIN, samples=2, streamer=generator.streamer(lambda piece: None))


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
def test_tokenizer_without_a_special_token_is_refused(model, tokenizer, name, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    setattr(bare, name, None)
    with pytest.raises(InputError, match=name):
        TextGenerator(model, bare, seed=0)


def test_training_mode_is_restored(model, tokenizer):
    model.train()
    texts_of(TextGenerator(model, tokenizer, seed=0), ["山"])
    assert model.training
