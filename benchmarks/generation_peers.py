"""The contenders of benchmarks/generation.py: whole models of one size, and how each of them goes on with a text."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from training_peers import BUCKET_SIZE, CONTENDERS, HASHES, Sizes


def _transformers_reformer(sizes: Sizes) -> nn.Module:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    # As many buckets as the length has chunks, of two factors, as its documentation asks for.
    buckets = 2 * math.ceil(sizes.tokens / BUCKET_SIZE / 2)
    rows = 2 ** round(math.log2(sizes.tokens) / 2)
    config = ReformerConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, attn_layers=["lsh"] * sizes.depth,
        num_attention_heads=sizes.heads, attention_head_size=sizes.hidden_size // sizes.heads,
        feed_forward_size=4 * sizes.hidden_size, lsh_attn_chunk_length=BUCKET_SIZE, num_hashes=HASHES,
        num_buckets=buckets, axial_pos_shape=[rows, math.ceil(sizes.tokens / rows)],
        axial_pos_embds_dim=[sizes.hidden_size // 4, sizes.hidden_size - sizes.hidden_size // 4],
        max_position_embeddings=sizes.tokens, is_decoder=True, hash_seed=None, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return ReformerModelWithLMHead(config)


def _generate(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """Transformers' generate(), the likeliest token each time."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        use_cache=True, eos_token_id=None, pad_token_id=0,
    )[:, prompt.shape[1] :]  # fmt: skip


def _generate_reformer_pytorch(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    # Of its TrainingWrapper; it draws, and takes the best 10 % of the tokens to draw from.
    return model.generate(prompt, count)


def _reformer_pytorch(sizes: Sizes) -> nn.Module:
    from reformer_pytorch.generative_tools import TrainingWrapper

    return TrainingWrapper(CONTENDERS["reformer_pytorch"].build(sizes))


class Generator(NamedTuple):
    """One way to go on with a text.

    Attributes:
        label: its name in tables.
        package: the distribution that brings it.
        build: makes the model, for `Sizes.tokens` tokens at most.
        generate: (model, prompt [B, T], count) -> new tokens [B, count].
        new_tokens: how many new tokens are timed at most: where each costs a whole forward pass, fewer tell as much.
    """

    label: str
    package: str
    build: Callable[[Sizes], nn.Module]
    generate: Callable[[nn.Module, Tensor, int], Tensor]
    new_tokens: int | None = None


GENERATORS: dict[str, Generator] = {
    "ours": Generator("ours", "reformer_lm", CONTENDERS["ours"].build, _generate),
    "gpt2": Generator("GPT-2 (SDPA), its cache", "transformers", CONTENDERS["gpt2"].build, _generate),
    "transformers_reformer": Generator(
        "transformers' Reformer, its cache", "transformers", _transformers_reformer, _generate
    ),
    "reformer_pytorch": Generator(
        "reformer-pytorch", "reformer-pytorch", _reformer_pytorch, _generate_reformer_pytorch, new_tokens=8
    ),
}


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
    """Transformers' Reformer prints several warnings a token."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    silent = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)


def build(name: str, sizes: Sizes, device: str, dtype: torch.dtype) -> Any:
    """The model of a contender, ready to generate."""
    torch.manual_seed(0)
    with in_silence():
        model = GENERATORS[name].build(sizes).to(device, dtype).eval()
    if hasattr(model, "config"):
        # Random weights would end the text at any time.
        model.generation_config.eos_token_id = None
        model.config.use_cache = True
    return model


class NextTokens:
    """A model with a cache that has read a context, asked for one token after the other.

    Args:
        model: ours or GPT-2.
        context: tokens read before.
        device: where it is.
        batch: texts that go on together.
    """

    def __init__(self, model: Any, context: int, device: str, batch: int = 1) -> None:
        self.model = model
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            output = model(tokens[:, :-1], use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.next = tokens[:, -1:]

    @torch.no_grad()
    def step(self) -> None:
        """One token."""
        output = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = output.logits[:, -1].argmax(dim=-1, keepdim=True)

    def cache_bytes(self) -> int:
        """Memory that the cache holds."""
        if hasattr(self.cache, "bytes"):
            return self.cache.bytes()
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))
