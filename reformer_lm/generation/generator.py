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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, TextStreamer

from reformer_lm.errors import InputError
from reformer_lm.generation.sampling import GenerationSettings, SeededSampling
from reformer_lm.text import encode_article

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Tokens of the prompt that a streamer decodes before the first new token, so that the seam between them is
# right.
STREAMED_CONTEXT = 16


@dataclass(frozen=True)
class GeneratedText:
    """One sample.

    Attributes:
        prompt: The text that was to be continued, as given; "" for an article from nothing.
        prompt_index: Which of the prompts, from 0.
        sample_index: Which sample of that prompt, from 0.
        text: The continuation, without the prompt.
        token_ids: The new tokens, without the end of the article.
        finished: Whether the model ended the article itself, rather than reaching the length.
        tokens_per_second: New tokens of all samples of its batch, by the time the batch took.
    """

    prompt: str
    prompt_index: int
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    tokens_per_second: float


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
        encoded = [self._prompt_tokens(prompt, settings.length) for prompt in prompts]
        jobs = [
            _Job(prompt, prompt_index, sample_index, tokens, self._generator(tokens))
            for prompt_index, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
            for sample_index in range(samples)
        ]
        return self._run(jobs, settings, batch_size, streamer)

    def streamer(self, write: Callable[[str], None]) -> TextStreamer:
        """A streamer for ``generate`` that gives the continuation to ``write``, piece by piece."""
        return ContinuationStreamer(self.tokenizer, write)

    def _run(
        self,
        jobs: Sequence[_Job],
        settings: GenerationSettings,
        batch_size: int,
        streamer: TextStreamer | None,
    ) -> Iterator[GeneratedText]:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            started = time.perf_counter()
            rows = self._decode_batch(batch, settings, streamer)
            seconds = time.perf_counter() - started
            # The end of an article is a token that was drawn, too.
            drawn = sum(len(tokens) + finished for tokens, finished in rows)
            for job, (tokens, finished) in zip(batch, rows, strict=True):
                yield GeneratedText(
                    prompt=job.prompt,
                    prompt_index=job.prompt_index,
                    sample_index=job.sample_index,
                    text=continuation_text(self.tokenizer, job.tokens[-STREAMED_CONTEXT:], tokens),
                    token_ids=tuple(tokens),
                    finished=finished,
                    tokens_per_second=drawn / seconds,
                )

    def _decode_batch(
        self, batch: Sequence[_Job], settings: GenerationSettings, streamer: TextStreamer | None
    ) -> list[tuple[list[int], bool]]:
        """The new tokens of each job, and whether the article ended."""
        tokenizer = self.tokenizer
        longest = max(len(job.tokens) for job in batch)
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, job in enumerate(batch):
            input_ids[row, longest - len(job.tokens) :] = torch.tensor(job.tokens)
            attention_mask[row, longest - len(job.tokens) :] = 1
        with self._undisturbed():
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                generation_config=self._generation_config(settings),
                logits_processor=LogitsProcessorList([SeededSampling([job.random for job in batch], settings)]),
                streamer=streamer,
            )
        rows = []
        for tokens in output[:, longest:].tolist():
            finished = tokenizer.eos_token_id in tokens
            rows.append((tokens[: tokens.index(tokenizer.eos_token_id)] if finished else tokens, finished))
        return rows

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, and nothing of a saved generation_config.json, whose values would be filled in."""
        was_training, saved = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.train(was_training)
            self.model.generation_config = saved

    def _generation_config(self, settings: GenerationSettings) -> GenerationConfig:
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
            "max_new_tokens": settings.length,
            "repetition_penalty": float(settings.repetition_penalty),
            "suppress_tokens": sorted(never - {eos, None}),
            # A prompt is there to be continued: the article does not end before one token was written.
            "begin_suppress_tokens": [eos],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": tokenizer.pad_token_id,
            # SeededSampling draws; what it leaves to generate() is to take the token it has drawn.
            "do_sample": False,
        }
        return GenerationConfig(**options)

    def _prompt_tokens(self, prompt: str, length: int) -> list[int]:
        """The article start and the prompt, cut at its beginning if it does not fit."""
        longest = int(self.model.config.max_position_embeddings)
        room = longest - length
        if room < 1:
            raise InputError(
                f"a length of {length} does not fit: the model reads {longest} tokens, so "
                f"at most {longest - 1} can be written after the start of an article"
            )
        tokens = encode_article(self.tokenizer, prompt)[:-1]
        if len(tokens) > room:
            self._on_note(
                f"the prompt has {len(tokens)} tokens, but the model reads {longest} and {length} are to be "
                f"written: only the prompt's last {room} are read"
            )
            tokens = tokens[-room:]
        return tokens

    def _generator(self, tokens: Sequence[int]) -> torch.Generator:
        """The random numbers of the next sample after these tokens."""
        number = self._samples_given[tuple(tokens)]
        self._samples_given[tuple(tokens)] += 1
        name = ",".join(map(str, [self.seed, number, *tokens]))
        digest = hashlib.sha256(name.encode("ascii")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class _Job:
    """One sample that is to be drawn."""

    prompt: str
    prompt_index: int
    sample_index: int
    tokens: list[int]
    random: torch.Generator


class ContinuationStreamer(TextStreamer):
    """Hands the continuation to a function as it grows, a Chinese character at a time.

    Decoding one token more only ever appends text, so that what it has written is exactly
    ``GeneratedText.text``. transformers' own streamer decodes new tokens apart from the prompt and forgets
    them at a newline, which loses spaces and joins of words at such seams.

    Args:
        tokenizer: The tokenizer to decode with.
        write: Receives each new piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer)
        self._write = write
        self._tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time.

        Args:
            value: [1, tokens] at first, then [1].
        """
        if self._tokens:
            self._write(continuation_text(self.tokenizer, self._tokens, value.tolist()))
        self._tokens = [*self._tokens, *value.flatten().tolist()][-STREAMED_CONTEXT:]

    def end(self) -> None:
        """Get ready for another sample; nothing is held back."""
        self._tokens = []


def continuation_text(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], continuation: Iterable[int]) -> str:
    """The text that tokens add to a prompt, with the space (or the join of a word) between the two.

    Args:
        tokenizer: The tokenizer to decode with.
        prompt: The last tokens of the prompt.
        continuation: The tokens after it.

    Returns:
        The text; special tokens are left out.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *continuation], skip_special_tokens=True)
    return whole[len(before) :]
