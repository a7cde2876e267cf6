"""How the next token is drawn: settings, and a sampler in which every row has its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from reformer_lm.errors import InputError


@dataclass(frozen=True)
class GenerationSettings:
    """How to sample.

    Attributes:
        length: Most new tokens; an article that ends earlier is shorter.
        temperature: Divides the logits: below 1 safer, above 1 more adventurous text.
        top_k: Draw from this many likeliest tokens only; 0 for all.
        top_p: Draw from the likeliest tokens that make up this share of the probability; 1 for all.
        repetition_penalty: Above 1 makes tokens that were already used less likely (Keskar et al. 2019,
            section 4.1).
        min_p: Leave out tokens less likely than this share of the likeliest one's probability; 0 for none
            (Nguyen et al. 2024, arXiv 2407.01082).
        typical_p: Draw from the tokens whose surprisal is nearest to the expected one, up to this share of the
            probability; 1 for all (Meister et al. 2022, arXiv 2202.00666).
        no_repeat_ngram: No run of so many tokens comes twice; 0 for no such rule.
        stop: Strings that end the text; they are not part of it.
        overflow: What happens where prompt and length do not fit into the model's longest sequence: "error" refuses;
            "slide" goes on from the last half of it whenever it is full.
    """

    length: int = 200
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    min_p: float = 0.0
    typical_p: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    overflow: Literal["error", "slide"] = "error"

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {self.length}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature must be greater than 0, got {self.temperature} (for greedy choice: top_k 1)")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty must be greater than 0, got {self.repetition_penalty}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.typical_p <= 1:
            raise InputError(f"typical_p must be in (0, 1], got {self.typical_p}")
        if self.no_repeat_ngram < 0:
            raise InputError(f"no_repeat_ngram must be at least 1, or 0 for no such rule, got {self.no_repeat_ngram}")
        if not all(self.stop):
            raise InputError("a stop string is empty: give at least one character")
        if self.overflow not in ("error", "slide"):
            raise InputError(f'overflow must be "error" or "slide", got {self.overflow!r}')


class SeededSampling(LogitsProcessor):
    """Draws each row's token with its own random numbers; all other tokens get a score of -inf.

    ``generate()`` samples a whole batch from the global generator, so that a sample would depend on its
    neighbours.

    Args:
        generators: One for each row, on the CPU.
        settings: Temperature, top_k, top_p, min_p and typical_p, applied in this order, which is transformers'.
    """

    def __init__(self, generators: Sequence[torch.Generator], settings: GenerationSettings) -> None:
        self.generators = generators
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
        if settings.top_k > 0:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p > 0:
            self.warpers.append(MinPLogitsWarper(settings.min_p))
        if settings.typical_p < 1:
            self.warpers.append(TypicalLogitsWarper(settings.typical_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw.

        Args:
            input_ids: [rows, tokens so far].
            scores: [rows, vocabulary], the logits after penalties and suppressed tokens.

        Returns:
            [rows, vocabulary]: 0 for the token drawn, -inf for the rest.
        """
        scores = self.warpers(input_ids, scores)
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        draws = torch.cat([torch.rand(1, generator=random, dtype=torch.float64) for random in self.generators])
        # The first token whose cumulative probability exceeds the draw: one of probability 0 adds nothing and is
        # never the first, and since a draw is below 1, there always is one. (The total may be a little off 1.)
        thresholds = draws[:, None].to(scores.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, thresholds, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
