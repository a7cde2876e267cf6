"""predict.py with a masked language model: print what it would fill in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from reformer_lm.errors import InputError
from reformer_lm.generation.filling import FilledText, fill_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def require_filling(arguments: argparse.Namespace) -> None:
    """Refuse what a masked language model cannot do.

    Raises:
        InputError: Something else than filling in was asked for.
    """
    for name in ("ppl", "unconditional"):
        if getattr(arguments, name):
            raise InputError(
                f"--{name} needs a model that predicts the next token, and {arguments.model_dir} fills in [MASK]; "
                "leave it out, or give another --model_dir"
            )


class FillingJob:
    """Fills in the masks of texts.

    Args:
        arguments: Of the command line.
        model: A masked language model.
        tokenizer: The model's.

    Raises:
        InputError: If something else than filling in was asked for.
    """

    def __init__(
        self, arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        require_filling(arguments)
        self._model, self._tokenizer = model, tokenizer
        self._json: bool = arguments.json
        self._quiet: bool = arguments.quiet

    def run(self, texts: Iterator[str]) -> None:
        """Print each text filled in and, unless --quiet, the likeliest tokens of each place."""
        for text in texts:
            self.turn(text)

    def turn(self, text: str) -> None:
        """Print one text."""
        filled = fill_masks(self._model, self._tokenizer, text)
        if self._json:
            print(_as_json(filled), flush=True)
            return
        print(filled.text, flush=True)
        if not self._quiet:
            for number, candidates in enumerate(filled.places, start=1):
                shown = "  ".join(f"{candidate.token} {candidate.probability:.3f}" for candidate in candidates)
                print(f"  {number}: {shown}", flush=True)


def _as_json(filled: FilledText) -> str:
    places = [
        [{"token": candidate.token, "probability": round(candidate.probability, 6)} for candidate in candidates]
        for candidates in filled.places
    ]
    return json.dumps({"given": filled.given, "text": filled.text, "masks": places}, ensure_ascii=False)
