"""A text in turns: what the cache remembers changes nothing but the time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from reformer_lm.errors import InputError
from reformer_lm.generation import Conversation, GenerationSettings, TextGenerator

PLAIN = GenerationSettings(length=6, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
MAXIMUM = 64


def test_conversation_equals_the_whole_text_read_anew(model, tokenizer):
    cached = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain._cache = None
    for words in ("山水", "春夏", "", "ab"):
        before = cached.tokens_read
        turn, expected = cached.turn(words), plain.turn(words)
        assert turn.text == expected.text
        assert cached.tokens == plain.tokens
        # All but the last token, which nothing has followed yet.
        assert cached.tokens_read == len(cached.tokens) - 1 > before
    cached.begin_anew()
    assert cached.tokens == () and cached.tokens_read == 0
    fresh = Conversation(TextGenerator(model, tokenizer, seed=9), PLAIN)
    cached._generator = TextGenerator(model, tokenizer, seed=9)
    assert cached.turn("天").text == fresh.turn("天").text


def test_conversation_reads_only_what_is_new(model, tokenizer):
    conversation = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    conversation.turn("山水云风花雪月")
    read = []
    with model.reformer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1])):
        conversation.turn("天地")
    # The last token of the turn before, the new words, then one token after the other.
    assert read == [3, 1, 1, 1, 1, 1]


def test_conversation_slides_on(endless_model, tokenizer):
    settings = dataclasses.replace(PLAIN, length=30, overflow="slide")
    cached = Conversation(TextGenerator(endless_model, tokenizer, seed=3), settings)
    plain = Conversation(TextGenerator(endless_model, tokenizer, seed=3), settings)
    plain._cache = None
    for words in ("山水", "春夏", "天", "地"):
        assert cached.turn(words).text == plain.turn(words).text
        assert cached.tokens == plain.tokens
        assert len(cached.tokens) <= MAXIMUM


def test_conversation_goes_on_after_a_turn_that_failed(model, tokenizer):
    conversation = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain._cache = None
    conversation.turn("山水"), plain.turn("山水")
    before, steps = conversation.tokens, itertools.count()

    def run_out_of_memory(module, inputs):
        if next(steps) == 3:
            raise RuntimeError("out of memory")

    with model.reformer.register_forward_pre_hook(run_out_of_memory), pytest.raises(RuntimeError):
        conversation.turn("春夏")
    assert conversation.tokens == before and conversation.tokens_read == 0
    # The numbers that were drawn for the turn that failed are gone.
    plain._generator.random_numbers([*before, *tokenizer.encode("春夏")])
    assert conversation.turn("春夏").text == plain.turn("春夏").text


def test_conversation_whose_words_were_taken_back(model, tokenizer):
    conversation = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain = Conversation(TextGenerator(model, tokenizer, seed=3), PLAIN)
    plain._cache = None
    for each in (conversation, plain):
        each.turn("山水")
        each._tokens = each._tokens[:-3]
    assert conversation.turn("春夏").text == plain.turn("春夏").text


def test_conversation_that_does_not_fit_stays_as_it_was(endless_model, tokenizer):
    conversation = Conversation(TextGenerator(endless_model, tokenizer, seed=3), dataclasses.replace(PLAIN, length=30))
    conversation.turn("山水")
    before = conversation.tokens
    with pytest.raises(InputError, match="the text has grown too long: .*, or begin anew"):
        conversation.turn("春夏秋冬")
    assert conversation.tokens == before
    with pytest.raises(InputError, match="^prompt and length do not fit"):
        Conversation(TextGenerator(endless_model, tokenizer, seed=3), PLAIN).turn("山" * MAXIMUM)
