"""Masked language modelling: which tokens are hidden, and behind what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Labels that do not count, as everywhere in torch and transformers.
IGNORED = -100

# Of the chosen tokens so many are replaced by [MASK], and so many by another token; the others stay as they are.
_HIDDEN, _REPLACED = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """BERT's masking: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Which are chosen follows from the key alone, so that a resumed run hides what the uninterrupted one would.

    Attributes:
        probability: Of a token to be chosen; of each row at least one is, if it has any that may be.
        mask_token: Id of [MASK].
        special_tokens: Ids that are neither chosen nor put in.
        vocab_size: Number of tokens.

    Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1.
    """

    probability: float
    mask_token: int
    special_tokens: tuple[int, ...]
    vocab_size: int

    def hide(self, row: Tensor, key: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hide some tokens of a row.

        Args:
            row: int64 [T].
            key: Whole numbers of at least 0 that the random numbers follow from.

        Returns:
            The row as the model sees it, and its labels, -100 where nothing is asked: int64 [T] each.
        """
        random = np.random.default_rng(list(key))
        tokens = row.numpy()
        eligible = ~np.isin(tokens, self.special_tokens)
        draws = random.random(len(tokens))
        chosen = eligible & (draws < self.probability)
        if eligible.any() and not chosen.any():
            chosen[np.where(eligible, draws, np.inf).argmin()] = True
        fates = random.random(len(tokens))
        ordinary = np.setdiff1d(np.arange(self.vocab_size), self.special_tokens)
        others = random.choice(ordinary, len(tokens))
        hidden = np.where(fates < _HIDDEN, self.mask_token, np.where(fates < _HIDDEN + _REPLACED, others, tokens))
        labels = np.where(chosen, tokens, IGNORED)
        return torch.from_numpy(np.where(chosen, hidden, tokens)), torch.from_numpy(labels)
