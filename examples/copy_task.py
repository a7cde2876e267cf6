"""The Reformer paper's copy task: a model of one layer repeats a random string that it has seen once.

    python examples/copy_task.py

A sequence is `0 w 0 w`, w random symbols; loss and accuracy count on the second w only (Kitaev et al. 2020, section
5). The heads are LSH heads alone: each token finds by its hash what it is to repeat. benchmarks/duplication.py asks
how many hashes that takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from example import begin, count, parser_of, run
from torch import Tensor

from reformer_lm import InputError, ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.command_line import CommandLineParser
from reformer_lm.training.fitting import fit


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = parser_of(__doc__, steps=150, learning_rate=2e-3)
    parser.add_argument("--word", type=count, default=31, help="symbols in w")
    parser.add_argument("--symbols", type=count, default=63, help="different symbols")
    parser.add_argument("--hidden_size", type=count, default=128, help="width of the model")
    parser.add_argument("--hashes", type=count, default=4, help="hash rounds")
    parser.add_argument("--batch", type=count, default=32, help="strings a step")
    return parser


def strings(number: int, word: int, symbols: int, generator: torch.Generator) -> Tensor:
    """Sequences `0 w 0 w`, int64 [number, 2 * (word + 1)]."""
    half = torch.randint(1, symbols + 1, (number, word + 1), generator=generator)
    half[:, 0] = 0
    return torch.cat((half, half), dim=1)


def batches(arguments: argparse.Namespace, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Endless new strings; only the second w is to be predicted."""
    while True:
        tokens = strings(arguments.batch, arguments.word, arguments.symbols, generator)
        labels = tokens.clone()
        labels[:, : arguments.word + 2] = -100
        yield {"input_ids": tokens, "labels": labels}


@torch.no_grad()
def accuracy(model: ReformerLMForCausalLM, tokens: Tensor, word: int) -> float:
    """Share of the symbols of the second w that the model thinks likeliest, given all before them."""
    guesses = model(tokens).logits[:, word + 1 : -1].argmax(-1)
    return float((guesses == tokens[:, word + 2 :]).float().mean())


def main(argv: list[str] | None = None) -> float:
    """Trains, and prints the accuracy on new strings."""
    arguments = build_parser().parse_strictly(argv)
    if arguments.hidden_size % 4:
        raise InputError(f"--hidden_size is {arguments.hidden_size}; give a multiple of 4, the number of heads")
    generator = begin(arguments.seed)
    config = ReformerLMConfig(
        vocab_size=arguments.symbols + 1, hidden_size=arguments.hidden_size, num_hidden_layers=1, num_attention_heads=4,
        num_local_heads=0, num_hashes=arguments.hashes, bucket_size=8, max_position_embeddings=2 * arguments.word + 2,
    )  # fmt: skip
    model = ReformerLMForCausalLM(config)
    tests = strings(256, arguments.word, arguments.symbols, generator)
    before = accuracy(model.eval(), tests, arguments.word)
    data = batches(arguments, generator)
    losses = fit(model, data, steps=arguments.steps, learning_rate=arguments.lr, progress=not arguments.quiet)
    after = accuracy(model, tests, arguments.word)
    example = tests[0].tolist()
    answer = model(tests[:1]).logits[0, arguments.word + 1 : -1].argmax(-1).tolist()
    print(f"w          {' '.join(map(str, example[1 : arguments.word + 1]))}")
    print(f"repeated   {' '.join(map(str, answer))}")
    print(f"loss {losses[-1]:.4f} after {arguments.steps} steps")
    print(f"accuracy on the second w of 256 new strings: {before:.1%} before training, {after:.1%} after")
    return after


if __name__ == "__main__":
    run(main)
