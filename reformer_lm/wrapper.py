"""TrainingWrapper: reformer-pytorch's training and generation calls, over our model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the best (1 - thres) share of the vocabulary, at least one token.

    Args:
        logits: [B, vocabulary].
        thres: share of the vocabulary to drop.

    Returns:
        [B, vocabulary], -inf where dropped.
    """
    k = max(1, int((1 - thres) * logits.shape[-1]))
    lowest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the most probable tokens up to a cumulative probability of 1 - thres, at least one token.

    The meaning of ``thres`` is reformer-pytorch's: 0.9 keeps a nucleus of 0.1.

    Args:
        logits: [B, vocabulary].
        thres: probability mass to drop.

    Returns:
        [B, vocabulary], -inf where dropped.
    """
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if the ones before it have not reached the mass yet.
    dropped = probabilities.cumsum(dim=-1) - probabilities > 1 - thres
    return logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)


class TrainingWrapper(nn.Module):
    """Loss and generation around a causal language model, called as in reformer-pytorch.

    Args:
        net: a model whose forward takes input_ids, attention_mask and labels (ours, or any of transformers').
        ignore_index: target token that does not count in the loss.
        pad_value: token that fills up uneven sequences.
    """

    def __init__(self, net: PreTrainedModel, ignore_index: int = -100, pad_value: int = 0) -> None:
        super().__init__()
        self.net = net
        self.ignore_index = ignore_index
        self.pad_value = pad_value
        self.max_seq_len: int = net.config.max_position_embeddings

    def forward(self, x: Tensor | Sequence[Tensor], return_loss: bool = False, **kwargs: Any) -> Tensor:
        """Logits, or the mean loss of predicting each token from those before it.

        Args:
            x: tokens [B, T], or a sequence of B token vectors of uneven lengths. What fills them up is never
                attended to and never scored.
            return_loss: whether to return the loss.
            **kwargs: ``input_mask`` (bool [B, T], reformer-pytorch's name of the attention mask); others go to the net.

        Returns:
            Logits [B, T, vocabulary], or a scalar loss in nats.
        """
        mask = kwargs.pop("input_mask", None)
        if not isinstance(x, Tensor):
            if mask is None:
                mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in x], batch_first=True)
            x = pad_sequence(list(x), batch_first=True, padding_value=self.pad_value)
        if not return_loss:
            return self.net(x, attention_mask=mask, **kwargs).logits
        # The last token is a target only: max_seq_len + 1 tokens can be trained on, and with chunked attention, where
        # later tokens move the chunks, the loss is that of the logits which the first tokens alone have.
        inputs, targets = x[:, :-1], x[:, 1:]
        targets = targets.masked_fill(targets == self.ignore_index, -100)
        if mask is not None:
            targets = targets.masked_fill(~mask[:, 1:].bool(), -100)
            mask = mask[:, :-1]
        return self.net(inputs, attention_mask=mask, labels=inputs, shift_labels=targets, **kwargs).loss

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = top_k,
        filter_thres: float = 0.9,
        **kwargs: Any,
    ) -> Tensor:
        """Samples ``seq_len`` tokens, or fewer if every row has ended.

        A net that has a cache reads each token once. Beyond ``max_seq_len`` only the last so many tokens are seen, and
        all of them are read again for each new one, as in reformer-pytorch.

        Args:
            start_tokens: prompts [B, T] or one prompt [T], T >= 1.
            seq_len: number of tokens to sample.
            eos_token: token that ends a row; the rows are filled up with it.
            temperature: divides the logits.
            filter_logits_fn: `top_k`, `top_p` or any function of (logits [B, vocabulary], thres=).
            filter_thres: given to it.
            **kwargs: ``input_mask`` (bool [B, T]); others go to the net, which then works without a cache.

        Returns:
            The new tokens only, [B, n] or [n].
        """
        was_training = self.net.training
        self.net.eval()
        tokens = start_tokens if start_tokens.dim() == 2 else start_tokens.unsqueeze(0)
        mask = kwargs.pop("input_mask", None)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        begin = tokens.shape[1]
        cache = None
        ended = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
        try:
            for _ in range(seq_len):
                if tokens.shape[1] > self.max_seq_len:
                    cache = None
                seen, seen_mask = tokens[:, -self.max_seq_len :], mask[:, -self.max_seq_len :]
                if cache is not None:
                    seen = seen[:, -1:]
                cached = not kwargs and tokens.shape[1] <= self.max_seq_len
                output = self.net(
                    seen, attention_mask=seen_mask, past_key_values=cache, use_cache=cached, logits_to_keep=1, **kwargs
                )
                # None where the net has no cache.
                cache, logits = output.past_key_values, output.logits[:, -1]
                weights = torch.softmax(filter_logits_fn(logits, thres=filter_thres) / temperature, dim=-1)
                sample = torch.multinomial(weights, 1)
                if eos_token is not None:
                    sample = sample.masked_fill(ended, eos_token)
                    ended = ended | (sample == eos_token)
                tokens = torch.cat((tokens, sample), dim=1)
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
                if bool(ended.all()):
                    break
        finally:
            self.net.train(was_training)
        new = tokens[:, begin:]
        return new if start_tokens.dim() == 2 else new.squeeze(0)
