"""Judge a model while it trains: its loss on held-out text, and a sample of what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reformer_lm.corpus import EvaluationWindows
from reformer_lm.heads.vocabulary import ReformerLMVocabularyHead
from reformer_lm.training.batches import article_numbers
from reformer_lm.training.masking import IGNORED, Masking
from reformer_lm.training.occupancy import BucketSizes, record_bucket_sizes
from reformer_lm.training.parallel import Processes

SAMPLE_TOKENS = 48
# The masks of a validation are the same in every run: of what they hide, losses can be compared.
_MASK_KEY = 20181011


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        loss: Mean over the tokens, in nats.
        tokens: How many were scored.
        buckets: By layer, how many hash buckets held how many tokens of the first window (see `record_bucket_sizes`).
    """

    loss: float
    tokens: int
    buckets: Mapping[int, BucketSizes] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Perplexity, exp of a loss in nats, infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def validate(
    model: nn.Module,
    windows: EvaluationWindows,
    batch_size: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    begin_token: int | None = None,
    processes: Processes | None = None,
    masking: Masking | None = None,
) -> Validation | None:
    """Mean loss of a model over a stream, each token but the first scored exactly once.

    Of a masked language model those tokens are scored that a mask hides, which is the same each time.

    Of several processes each scores its share of the windows; all of them get the same result.

    Args:
        model: A language model; it is left in the mode it was in.
        windows: The stream's windows.
        batch_size: Windows at a time.
        device: Where the model is.
        should_stop: Asked before each batch; if it says yes, validation is given up.
        begin_token: The token articles begin with, if those in one window must not see each other.
        processes: Those that share the work; None for this one alone.
        masking: Hides what a masked language model is to fill in; None for one that predicts the next token.

    Returns:
        The result, None if it was given up.
    """
    was_training = model.training
    model.eval()
    count, rank = (processes.count, processes.rank) if processes else (1, 0)
    groups = _groups(windows, batch_size)
    total, hidden = 0.0, 0
    buckets: Mapping[int, BucketSizes] = {}
    # Ours need not form logits to know the loss.
    options = {"skip_logits": True} if isinstance(model, ReformerLMVocabularyHead) else {}
    try:
        # FSDP2 gathers parameters while the model runs, which inference mode would forbid.
        with torch.inference_mode() if count == 1 else torch.no_grad():
            # As many rounds in each process, because a sharded model runs in all of them or in none.
            for first in range(0, len(groups), count):
                stop = should_stop()
                if processes.any(stop) if processes else stop:
                    return None
                number = first + rank
                group = groups[min(number, len(groups) - 1)]
                batch = torch.stack([windows[index] for index in group])
                articles = {} if begin_token is None else {"document_ids": article_numbers(batch, begin_token)}
                batch, labels = (batch, batch) if masking is None else _hidden(batch, group, masking)
                if number < len(groups):
                    hidden += int((labels != IGNORED).sum())
                with record_bucket_sizes(model) if first == 0 else nullcontext(buckets) as buckets:
                    # Divided by 1: the sum, which is added up in double precision.
                    inputs = {"input_ids": batch, "labels": labels, **articles}
                    output = model(
                        **{name: x.to(device) for name, x in inputs.items()},
                        num_items_in_batch=1,
                        use_cache=False,
                        **options,
                    )
                if number < len(groups):
                    total += float(output.loss)
    finally:
        model.train(was_training)
    if processes:
        total, of_all = processes.sum([total, hidden])
        hidden = int(of_all)
    scored = windows.scored_tokens if masking is None else hidden
    return Validation(total / max(scored, 1), scored, buckets)


def _hidden(batch: torch.Tensor, indices: range, masking: Masking) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows with masks, and what they hide; the token that a window shares with the one before counts there."""
    rows = [masking.hide(row, [_MASK_KEY, index]) for row, index in zip(batch, indices, strict=True)]
    inputs, labels = (torch.stack(list(part)) for part in zip(*rows, strict=True))
    shared = torch.tensor([index > 0 for index in indices])
    labels[shared, 0] = IGNORED
    return inputs, labels


def _groups(windows: EvaluationWindows, batch_size: int) -> list[range]:
    """Windows in batches of one length; the last, if shorter, comes alone, so that nothing is padded."""
    count = len(windows)
    full = count - 1 if count and len(windows[count - 1]) < windows.length else count
    groups = [range(first, min(first + batch_size, full)) for first in range(0, full, batch_size)]
    return groups + ([range(full, count)] if full < count else [])


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Let a model write the beginning of an article.

    The run's random numbers are left as they were, so that sampling more or less often trains the same model.

    Args:
        model: Not wrapped; it is left in the mode it was in.
        tokenizer: The model's.
        seed: Of the sample.
    """
    was_training = model.training
    model.eval()
    prompt = torch.tensor([[tokenizer.bos_token_id]], device=model.device)
    length = min(SAMPLE_TOKENS, model.config.max_position_embeddings - 1)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length)
    finally:
        model.train(was_training)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
