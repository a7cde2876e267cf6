"""Writing text with a trained model, through transformers' ``generate()``.

Every sample has its own stream of random numbers, derived from the seed, the prompt and the number of the
sample. What a sample becomes does therefore not depend on which other samples and prompts share its batch,
and the second prompt of a file continues the same way when it is asked for alone. (In single precision a
batch of another shape rounds differently in the last bits, which can tip a draw that falls on the very edge
between two tokens.)
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer

from reformer_lm.cache import LSHCache
from reformer_lm.errors import InputError
from reformer_lm.generation.sampling import GenerationSettings, SeededSampling
from reformer_lm.generation.streaming import (
    STREAMED_CONTEXT,
    ContinuationStreamer,
    Relay,
    StopStrings,
    continuation_text,
    first_stop,
)
from reformer_lm.text import encode_article

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FinishReason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class GeneratedText:
    """One sample.

    Attributes:
        prompt: The text that was to be continued, as given; "" for an article from nothing.
        prompt_index: Which of the prompts, from 0.
        sample_index: Which sample of that prompt, from 0.
        text: The continuation, without the prompt.
        token_ids: The new tokens, without the end of the article; with those of a stop string, which is not in the
            text.
        finish_reason: "end" where the model ended the article, "stop" where a stop string came, else "length".
        tokens_per_second: New tokens of all samples of its batch, by the time the batch took.
    """

    prompt: str
    prompt_index: int
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    tokens_per_second: float

    @property
    def finished(self) -> bool:
        """Whether the text came to an end of its own before the length was reached."""
        return self.finish_reason != "length"


class TextGenerator:
    """A model and its tokenizer, ready to write.

    It remembers how many samples of each prompt it has given, so that asking again gives new ones.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with ``bos_token``, ``eos_token`` and ``pad_token``.
        seed: Makes every sample repeatable.
        on_note: Called with one line when something the user should know happened (a prompt was cut).

    Raises:
        InputError: If the tokenizer lacks a special token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        for name in ("bos_token", "eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise InputError(f"the tokenizer has no {name}, which generation needs")
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self._on_note = on_note or (lambda note: None)
        self._samples_given: Counter[tuple[int, ...]] = Counter()

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings,
        *,
        samples: int = 1,
        batch_size: int = 8,
        streamer: TextStreamer | None = None,
    ) -> Iterator[GeneratedText]:
        """Continue prompts; an empty prompt starts an article from nothing.

        Args:
            prompts: The texts to continue.
            settings: How to sample.
            samples: Continuations of each prompt.
            batch_size: Most samples that are decoded together.
            streamer: Receives the tokens of the one sample as they are drawn.

        Returns:
            An iterator over the samples, all of the first prompt, then all of the second, and so on.

        Raises:
            InputError: If a number is below 1, or the length leaves no room for a prompt in the model's window.
        """
        if samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if streamer is not None and len(prompts) * samples != 1:
            raise InputError("only a single sample can be streamed")
        encoded = [self.read_prompt(encode_article(self.tokenizer, prompt)[:-1], settings) for prompt in prompts]
        jobs = [
            Job(prompt, prompt_index, sample_index, tokens, self.random_numbers(tokens))
            for prompt_index, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
            for sample_index in range(samples)
        ]
        return self._run(jobs, settings, batch_size, streamer)

    def streamer(self, write: Callable[[str], None], stop: Sequence[str] = ()) -> TextStreamer:
        """A streamer for ``generate`` that gives the continuation to ``write``, piece by piece.

        Args:
            write: Receives the pieces.
            stop: The settings' stop strings.
        """
        return ContinuationStreamer(self.tokenizer, write, stop)

    def _run(
        self,
        jobs: Sequence[Job],
        settings: GenerationSettings,
        batch_size: int,
        streamer: TextStreamer | None,
    ) -> Iterator[GeneratedText]:
        for first in range(0, len(jobs), batch_size):
            yield from self.decode(jobs[first : first + batch_size], settings, streamer)[0]

    def decode(
        self,
        jobs: Sequence[Job],
        settings: GenerationSettings,
        streamer: TextStreamer | None = None,
        cache: LSHCache | None = None,
    ) -> tuple[list[GeneratedText], list[list[int]]]:
        """Continue some prompts together.

        Args:
            jobs: What is to be continued.
            settings: How to sample.
            streamer: Receives the tokens of a single job.
            cache: Of a single job: what the model has read of it already; it is filled further.

        Returns:
            For each job its text, and the tokens the model has read or would read next: prompt and new ones, or what
            is left of them after the text has slid on.
        """
        started = time.perf_counter()
        rows = [_Row(job, list(job.tokens)) for job in jobs]
        relay = None if streamer is None else Relay(streamer)
        # More than one round only where texts slide on beyond the model's longest sequence.
        while unfinished := [row for row in rows if row.finish_reason is None]:
            self._decode_round(unfinished, settings, relay, cache)
        if streamer is not None:
            streamer.end()
        seconds = time.perf_counter() - started
        # The end of an article is a token that was drawn, too.
        drawn = sum(len(row.new) + (row.finish_reason == "end") for row in rows)
        texts = [self._generated(row, settings, drawn / seconds) for row in rows]
        return texts, [row.context for row in rows]

    def _generated(self, row: _Row, settings: GenerationSettings, tokens_per_second: float) -> GeneratedText:
        job = row.job
        text = continuation_text(self.tokenizer, job.tokens[-STREAMED_CONTEXT:], row.new)
        assert row.finish_reason is not None
        return GeneratedText(
            prompt=job.prompt,
            prompt_index=job.prompt_index,
            sample_index=job.sample_index,
            text=text[: first_stop(text, settings.stop)],
            token_ids=tuple(row.new),
            finish_reason=row.finish_reason,
            tokens_per_second=tokens_per_second,
        )

    def _decode_round(
        self, rows: Sequence[_Row], settings: GenerationSettings, relay: Relay | None, cache: LSHCache | None
    ) -> None:
        """Go on with rows until they are finished or the first of them fills the model's longest sequence."""
        tokenizer, window = self.tokenizer, self.window
        for row in rows:
            if len(row.context) == window:
                row.context = row.context[-(window // 2) :]
                if cache is not None:
                    cache.reset()
        longest = max(len(row.context) for row in rows)
        count = min(min(settings.length - len(row.new), window - len(row.context)) for row in rows)
        input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, longest - len(row.context) :] = torch.tensor(row.context)
            attention_mask[index, longest - len(row.context) :] = 1
        criteria = StoppingCriteriaList()
        if settings.stop:
            prompts = [row.job.tokens[-STREAMED_CONTEXT:] for row in rows]
            criteria.append(StopStrings(tokenizer, settings.stop, prompts, [row.new for row in rows], longest))
        with self.undisturbed():
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                generation_config=self.generation_config(settings, count, begins=not rows[0].new),
                logits_processor=LogitsProcessorList([SeededSampling([row.job.random for row in rows], settings)]),
                stopping_criteria=criteria,
                streamer=relay,
                **({} if cache is None else {"past_key_values": cache}),
            )
        for row, tokens in zip(rows, output[:, longest:].tolist(), strict=True):
            self._take_in(row, tokens, settings)

    def _take_in(self, row: _Row, tokens: list[int], settings: GenerationSettings) -> None:
        """Adds what a round has drawn to a row, and finds out whether it is finished."""
        ended = self.tokenizer.eos_token_id in tokens
        if ended:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        # A row that a string has stopped is filled up while the others go on; padding is never drawn.
        tokens = [token for token in tokens if token != self.tokenizer.pad_token_id]
        row.new += tokens
        row.context = row.context + tokens
        text = continuation_text(self.tokenizer, row.job.tokens[-STREAMED_CONTEXT:], row.new) if settings.stop else ""
        if first_stop(text, settings.stop) is not None:
            row.finish_reason = "stop"
        elif ended:
            row.finish_reason = "end"
        elif len(row.new) >= settings.length:
            row.finish_reason = "length"

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluation mode, and nothing of a saved generation_config.json, whose values would be filled in."""
        was_training, saved = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.train(was_training)
            self.model.generation_config = saved

    def generation_config(self, settings: GenerationSettings, count: int, begins: bool) -> GenerationConfig:
        """What ``generate()`` is told.

        Args:
            settings: How to sample.
            count: Most new tokens.
            begins: Whether nothing has been written yet.
        """
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id
        never = {
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
            tokenizer.bos_token_id,
            tokenizer.mask_token_id,
        }
        # An embedding padded beyond the vocabulary has rows that no token belongs to.
        never.update(range(len(tokenizer), int(self.model.config.vocab_size)))
        options: dict[str, Any] = {
            "max_new_tokens": count,
            "no_repeat_ngram_size": settings.no_repeat_ngram,
            "repetition_penalty": float(settings.repetition_penalty),
            "suppress_tokens": sorted(never - {eos, None}),
            # A prompt is there to be continued: the article does not end before one token was written.
            "begin_suppress_tokens": [eos] if begins else None,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": tokenizer.pad_token_id,
            # SeededSampling draws; what it leaves to generate() is to take the token it has drawn.
            "do_sample": False,
        }
        return GenerationConfig(**options)

    @property
    def window(self) -> int:
        """The longest sequence that the model reads."""
        return int(self.model.config.max_position_embeddings)

    def read_prompt(self, tokens: list[int], settings: GenerationSettings) -> list[int]:
        """What the model reads of a prompt: all, or with ``overflow="slide"`` its last tokens.

        Args:
            tokens: The article start and the prompt.
            settings: Length and overflow.

        Raises:
            InputError: With ``overflow="error"``, if prompt and length do not fit into the model.
        """
        window = self.window
        if settings.overflow == "error":
            if len(tokens) + settings.length > window:
                room = window - len(tokens)
                most = f"write at most {room}" if room > 0 else f"give at most {window - 2} tokens of prompt"
                raise InputError(
                    f"prompt and length do not fit: {len(tokens)} tokens with the start of the article and "
                    f"{settings.length} to be written, but the model reads {window}; {most}, or let the text slide on "
                    "from its last half (--overflow slide)"
                )
            return tokens
        if len(tokens) >= window:
            half = window // 2
            self._on_note(
                f"the prompt has {len(tokens)} tokens, but the model reads {window}: only its last {half} are read"
            )
            return tokens[-half:]
        return tokens

    def random_numbers(self, tokens: Sequence[int]) -> torch.Generator:
        """The random numbers of the next sample after these tokens."""
        number = self._samples_given[tuple(tokens)]
        self._samples_given[tuple(tokens)] += 1
        name = ",".join(map(str, [self.seed, number, *tokens]))
        digest = hashlib.sha256(name.encode("ascii")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Job:
    """One sample that is to be drawn.

    Attributes:
        prompt: As given.
        prompt_index: See `GeneratedText`.
        sample_index: See `GeneratedText`.
        tokens: What the model reads of the prompt.
        random: The sample's own random numbers.
    """

    prompt: str
    prompt_index: int
    sample_index: int
    tokens: list[int]
    random: torch.Generator


@dataclass
class _Row:
    """A job at work: the tokens the model reads (those of the prompt at first), and all new ones."""

    job: Job
    context: list[int]
    new: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
