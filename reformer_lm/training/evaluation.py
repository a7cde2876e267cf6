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
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.training.batches import article_numbers
from reformer_lm.training.occupancy import BucketSizes, record_bucket_sizes
from reformer_lm.training.parallel import Processes

SAMPLE_TOKENS = 48


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
) -> Validation | None:
    """Mean loss of a model over a stream, each token but the first scored exactly once.

    Of several processes each scores its share of the windows; all of them get the same result.

    Args:
        model: A causal language model; it is left in the mode it was in.
        windows: The stream's windows.
        batch_size: Windows at a time.
        device: Where the model is.
        should_stop: Asked before each batch; if it says yes, validation is given up.
        begin_token: The token articles begin with, if those in one window must not see each other.
        processes: Those that share the work; None for this one alone.

    Returns:
        The result, None if it was given up.
    """
    was_training = model.training
    model.eval()
    count, rank = (processes.count, processes.rank) if processes else (1, 0)
    groups = _groups(windows, batch_size)
    total = 0.0
    buckets: Mapping[int, BucketSizes] = {}
    # Ours need not form logits to know the loss.
    options = {"skip_logits": True} if isinstance(model, ReformerLMForCausalLM) else {}
    try:
        # FSDP2 gathers parameters while the model runs, which inference mode would forbid.
        with torch.inference_mode() if count == 1 else torch.no_grad():
            # As many rounds in each process, because a sharded model runs in all of them or in none.
            for first in range(0, len(groups), count):
                stop = should_stop()
                if processes.any(stop) if processes else stop:
                    return None
                number = first + rank
                batch = torch.stack([windows[index] for index in groups[min(number, len(groups) - 1)]]).to(device)
                articles = {} if begin_token is None else {"document_ids": article_numbers(batch, begin_token)}
                with record_bucket_sizes(model) if first == 0 else nullcontext(buckets) as buckets:
                    # Divided by 1: the sum, which is added up in double precision.
                    output = model(
                        input_ids=batch, labels=batch, num_items_in_batch=1, use_cache=False, **options, **articles
                    )
                if number < len(groups):
                    total += float(output.loss)
    finally:
        model.train(was_training)
    if processes:
        total = processes.sum([total])[0]
    return Validation(total / windows.scored_tokens, windows.scored_tokens, buckets)


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
