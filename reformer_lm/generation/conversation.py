"""A text that a person and the model write in turns."""

from __future__ import annotations

from transformers import TextStreamer

from reformer_lm.cache import LSHCache
from reformer_lm.errors import InputError
from reformer_lm.generation.generator import GeneratedText, Job, TextGenerator
from reformer_lm.generation.sampling import GenerationSettings
from reformer_lm.text import encode_article


class Conversation:
    """One text to which each turn adds a person's words and then the model's.

    What the model has read stays in a cache, so a turn costs what it adds, however long the text. (Models with
    ``lsh_mask="chunked"`` have no cache and read everything again.)

    Args:
        generator: Writes.
        settings: How to sample.
    """

    def __init__(self, generator: TextGenerator, settings: GenerationSettings) -> None:
        self._generator, self._settings = generator, settings
        self._tokens: list[int] = []
        # What the cache has read; None where there can be no cache.
        self._read: list[int] = []
        config = generator.model.config
        self._cache = LSHCache(config) if getattr(config, "lsh_mask", None) == "causal" else None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text so far, the start of the article included; after it has slid on, what is left of it."""
        return tuple(self._tokens)

    @property
    def tokens_read(self) -> int:
        """Tokens that the next turn will not have to read."""
        return len(self._read)

    def begin_anew(self) -> None:
        """Forgets the text."""
        self._tokens = []
        self._forget_cache()

    def turn(self, words: str, streamer: TextStreamer | None = None) -> GeneratedText:
        """Adds a person's words to the text, and lets the model go on.

        Args:
            words: They follow the text directly; in the first turn they begin an article.
            streamer: Receives the new tokens as they are drawn.

        Returns:
            What the model has added.

        Raises:
            InputError: With ``overflow="error"``, if text and length no longer fit into the model. The text stays as
                it was.
        """
        generator, settings = self._generator, self._settings
        encoded = encode_article(generator.tokenizer, words)[:-1]
        if self._tokens:
            # Not another start of an article.
            encoded = encoded[1:]
        try:
            tokens = generator.read_prompt([*self._tokens, *encoded], settings)
        except InputError as error:
            if not self._tokens:
                raise
            raise InputError(f"the text has grown too long: {error}, or begin anew") from None
        self._crop_to(tokens)
        job = Job(words, 0, 0, tokens, generator.random_numbers(tokens))
        try:
            (sample,), (self._tokens,) = generator.decode([job], settings, streamer, self._cache)
        except BaseException:
            # What the cache has read by now is not known.
            self._forget_cache()
            raise
        if self._cache is not None:
            self._read = self._tokens[: self._cache.get_seq_length()]
        return sample

    def _forget_cache(self) -> None:
        self._read = []
        if self._cache is not None:
            self._cache.reset()

    def _crop_to(self, tokens: list[int]) -> None:
        """Makes the cache forget what the text no longer begins with."""
        if self._cache is None or not self._read:
            return
        pairs = zip(self._read, tokens[:-1], strict=False)
        same = next((index for index, (read, token) in enumerate(pairs) if read != token), None)
        same = min(len(self._read), len(tokens) - 1) if same is None else same
        if same == len(self._read):
            return
        try:
            self._cache.crop(same - len(self._read))
        except ValueError:
            # Local heads remember only so much.
            self._forget_cache()
        else:
            self._read = self._read[:same]
