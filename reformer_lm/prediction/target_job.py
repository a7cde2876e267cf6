"""predict.py with an encoder-decoder: print a target for each source."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from reformer_lm.errors import InputError
from reformer_lm.generation import GenerationSettings
from reformer_lm.generation.targets import TargetWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def require_sources(arguments: argparse.Namespace) -> None:
    """Refuse what an encoder-decoder cannot do.

    Raises:
        InputError: Something else than targets for sources was asked for.
    """
    for name in ("ppl", "unconditional"):
        if getattr(arguments, name):
            raise InputError(
                f"--{name} needs a language model, and {arguments.model_dir} writes a target for a source; "
                "leave it out, or give another --model_dir"
            )


class TargetJob:
    """Writes targets.

    Args:
        arguments: Of the command line.
        settings: How to sample.
        seed: Of the samples.
        model: An encoder-decoder.
        tokenizer: The model's.

    Raises:
        InputError: If something else was asked for.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        settings: GenerationSettings,
        seed: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        require_sources(arguments)
        self._settings, self._seed = settings, seed
        self._samples: int = arguments.nsamples
        self._json: bool = arguments.json
        self._writer = TargetWriter(model, tokenizer, seed=seed)

    def run(self, texts: Iterator[str]) -> None:
        """Print the targets of each source, one a line."""
        for text in texts:
            self.turn(text)

    def turn(self, text: str) -> None:
        """Print the targets of one source."""
        for _ in range(self._samples):
            target = self._writer.write(text, self._settings)
            record = {"source": text, "target": target, "seed": self._seed}
            print(json.dumps(record, ensure_ascii=False) if self._json else target, flush=True)
