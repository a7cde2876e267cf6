"""What a masked language model would put in the place of [MASK]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reformer_lm.errors import InputError
from reformer_lm.text import encode_with_masks, mask_token_of
from reformer_lm.text.conventions import BEGIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Candidate:
    """A token for one place.

    Attributes:
        token: As the vocabulary writes it.
        text: What it stands for.
        probability: By the model, given the rest of the text, in which other masks stay masks.
    """

    token: str
    text: str
    probability: float


@dataclass(frozen=True)
class FilledText:
    """A text with masks, filled in.

    Attributes:
        given: The text with masks.
        text: With the likeliest token in each place.
        places: For each mask, from left to right, the likeliest tokens.
    """

    given: str
    text: str
    places: tuple[tuple[Candidate, ...], ...]


@torch.inference_mode()
def fill_masks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, candidates: int = 5
) -> FilledText:
    """Fill in the masks of a text, each by itself.

    Args:
        model: A masked language model, in evaluation mode.
        tokenizer: The model's.
        text: With [MASK] in the place of each hidden token.
        candidates: How many tokens to name for each place.

    Raises:
        InputError: If there is no mask in the text, or it has more tokens than the model can read.
    """
    if BEGIN not in text:
        raise InputError(f"the text has no {BEGIN}; write {BEGIN} in the place of each token that is to be filled in")
    ids = torch.tensor(encode_with_masks(tokenizer, text))
    longest = model.config.max_position_embeddings
    if len(ids) > longest:
        raise InputError(
            f"the text has {len(ids):,} tokens, more than the model's {longest:,}; give a shorter piece around {BEGIN}"
        )
    # The article begins with that token, too.
    (places,) = (ids[1:] == mask_token_of(tokenizer)).nonzero(as_tuple=True)
    logits = model(ids.unsqueeze(0).to(model.device)).logits[0, (places + 1).to(model.device)].float()
    special = torch.tensor(tokenizer.all_special_ids, device=logits.device)
    likeliest = logits.softmax(dim=-1).index_fill(1, special, 0.0).topk(min(candidates, logits.shape[1]), dim=-1)
    found = tuple(
        tuple(
            Candidate(str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token])), probability)
            for token, probability in zip(tokens, probabilities, strict=True)
        )
        for tokens, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    )
    pieces = text.split(BEGIN)
    filled = pieces[0] + "".join(best[0].text + piece for best, piece in zip(found, pieces[1:], strict=True))
    return FilledText(text, filled, found)
