"""Writing a target for a source, with an encoder-decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList

from reformer_lm.errors import InputError
from reformer_lm.generation.generator import TextGenerator
from reformer_lm.generation.sampling import GenerationSettings, SeededSampling
from reformer_lm.generation.streaming import first_stop
from reformer_lm.text import encode_article

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class TargetWriter:
    """An encoder-decoder and its tokenizer, ready to write.

    Args:
        model: The encoder-decoder.
        tokenizer: Its tokenizer, with ``bos_token``, ``eos_token`` and ``pad_token``.
        seed: Makes every target repeatable; each has random numbers of its own.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._generator = TextGenerator(model, tokenizer, seed=seed)

    def write(self, source: str, settings: GenerationSettings) -> str:
        """Write one target.

        Args:
            source: The source text.
            settings: How to sample; at most ``length`` tokens, and no more than the model's longest target.

        Raises:
            InputError: If the source is empty or has more tokens than the encoder can read.
        """
        if not source.strip():
            raise InputError("the source is empty; give a text")
        ids = encode_article(self._tokenizer, source)
        longest = int(self._model.config.encoder.max_position_embeddings)
        if len(ids) > longest:
            raise InputError(f"the source has {len(ids):,} tokens, more than the model's {longest:,}; shorten it")
        length = min(settings.length, int(self._model.config.decoder.max_position_embeddings) - 1)
        settings = replace(settings, length=length)
        begin = torch.tensor([[self._tokenizer.bos_token_id]], device=self._model.device)
        with self._generator.undisturbed():
            output = self._model.generate(
                torch.tensor([ids], device=self._model.device),
                decoder_input_ids=begin,
                generation_config=self._generator.generation_config(
                    replace(settings, length=length), length, begins=True
                ),
                logits_processor=LogitsProcessorList([SeededSampling([self._generator.random_numbers(ids)], settings)]),
            )
        text = str(self._tokenizer.decode(output[0], skip_special_tokens=True))
        return text[: first_stop(text, settings.stop)]
