"""Running a batch through a model: how likely each token was, and what would have been likelier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from reformer_lm.layers.linear import Linear
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.scoring.batches import EMPTY, Batch, Window, rows_to_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions of all rows together whose probabilities are normalised at once: [512, vocabulary] floats.
POSITIONS_PER_CHUNK = 512
# Chunks are filled up to a multiple of it, so that they have few sizes, and none that layers/linear.py calls few rows.
POSITIONS_MULTIPLE = 64


@dataclass(frozen=True)
class TokenScores:
    """What the model said of the tokens that one window scores, one entry each.

    Attributes:
        surprisals: Negative log likelihood in nats.
        ranks: How many tokens were at least as likely, itself included; empty unless asked for.
        alternatives: The likeliest tokens, as (id, log probability); empty unless asked for.
    """

    surprisals: Sequence[float]
    ranks: Sequence[int] = ()
    alternatives: Sequence[tuple[tuple[int, float], ...]] = ()


def score_batch(model: PreTrainedModel, batch: Batch, alternatives: int = 0) -> list[TokenScores]:
    """Run a batch.

    Args:
        model: A causal language model in evaluation mode.
        batch: Windows, which are padded on the right to the batch's length here.
        alternatives: How many of the likeliest tokens to tell in each place; 0 leaves out the ranks, too.

    Returns:
        For each window of the batch what became of the tokens that it scores.
    """
    length = batch.length
    rows = [*batch.windows, *[EMPTY] * (rows_to_run(len(batch.windows), length) - len(batch.windows))]
    # Made from lists in one go: a tensor of each row would cost more time than the smallest batches take to run.
    input_ids_BT, targets_BT, is_scored_BT = (
        torch.tensor(lists)
        for lists in (
            [[*window.inputs, *[0] * (length - len(window.inputs))] for window in rows],
            [[*window.targets, *[0] * (length - len(window.targets))] for window in rows],
            [[False] * first + [True] * (end - first) + [False] * (length - end) for first, end in map(_scored, rows)],
        )
    )
    # No attention mask: nothing that stands behind a token can reach it. A mask would make the model cut the
    # batch to its longest row, and the length would depend on the company.
    device = getattr(model, "device", torch.device("cpu"))
    places = is_scored_BT.flatten().nonzero().squeeze(-1).to(device)
    logit_chunks = _logit_chunks(model, input_ids_BT.to(device), places)
    targets = targets_BT.to(device).flatten()[places].split(POSITIONS_PER_CHUNK)
    parts = [_describe(logits, chunk, alternatives) for logits, chunk in zip(logit_chunks, targets, strict=True)]
    surprisals, ranks, ids, log_probabilities = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
    found = []
    end = 0
    for window in batch.windows:
        begin, end = end, end + window.end_scored - window.first_scored
        if not alternatives:
            found.append(TokenScores(surprisals[begin:end]))
            continue
        pairs = zip(ids[begin:end], log_probabilities[begin:end], strict=True)
        likeliest = [tuple(zip(tokens, values, strict=True)) for tokens, values in pairs]
        found.append(TokenScores(surprisals[begin:end], ranks[begin:end], likeliest))
    return found


def _scored(window: Window) -> tuple[int, int]:
    """The places of a window whose targets it scores: from the first to before the second."""
    end = len(window.inputs)
    return end - (window.end_scored - window.first_scored), end


def _logit_chunks(model: PreTrainedModel, input_ids_BT: Tensor, places: Tensor) -> Iterator[Tensor]:
    """The logits [N, vocabulary] in some places of a batch, so many at a time: all of them may be gigabytes."""
    if isinstance(model, ReformerLMForCausalLM):
        hidden = model.reformer(input_ids_BT).last_hidden_state.flatten(0, 1)
        for chunk in places.split(POSITIONS_PER_CHUNK):
            padded = functional.pad(chunk, (0, -len(chunk) % POSITIONS_MULTIPLE))
            yield model.compute_logits(hidden[padded])[: len(chunk)]
    else:
        # Another model may do more to its logits than apply its output layer.
        logits = model(input_ids=input_ids_BT).logits.flatten(0, 1)
        for chunk in places.split(POSITIONS_PER_CHUNK):
            yield logits[chunk]


def _describe(logits: Tensor, targets: Tensor, alternatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some places: surprisals, ranks, likeliest ids, their log probabilities, in float32 or better, on the CPU."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=dtype)
    own = log_probabilities.gather(-1, targets.unsqueeze(-1))
    surprisals = -own.squeeze(-1).double().cpu()
    if not alternatives:
        nothing = torch.empty((len(targets), 0))
        return surprisals, nothing, nothing, nothing
    ranks = (log_probabilities >= own).sum(-1)
    best = log_probabilities.topk(min(alternatives, logits.shape[-1]), dim=-1)
    return surprisals, ranks.cpu(), best.indices.cpu(), best.values.double().cpu()


@contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards the mode that was."""
    was_training = model.training
    model.eval()
    products = [module for module in model.modules() if isinstance(module, Linear)]
    for module in products:
        module.few_shapes = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module in products:
            module.few_shapes = False
        model.train(was_training)
