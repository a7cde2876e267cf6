"""Sums of two numbers, digit by digit: a small Reformer learns to add (minGPT's task).

    python examples/addition.py

85 + 50 = 135 is the sequence 8 5 5 0 5 3 1: both numbers, then the digits of the sum from the last to the first, as one
adds by hand. Only the digits of the sum are learned. Some pairs are held out and tell whether it can add or only
remembers.
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
    parser = parser_of(__doc__, steps=1500, learning_rate=5e-3)
    parser.add_argument("--digits", type=count, default=2, help="of each number, 1 to 4")
    parser.add_argument("--hidden_size", type=count, default=64, help="width of the model")
    parser.add_argument("--layers", type=count, default=2, help="of the model")
    parser.add_argument("--batch", type=count, default=64, help="sums a step")
    return parser


def sums(pairs: Tensor, digits: int) -> Tensor:
    """Sequences of digits.

    Args:
        pairs: each number below 10 ** (2 * digits) is a pair, its upper and lower half; int64 [N].
        digits: of each summand.

    Returns:
        int64 [N, 3 * digits + 1].
    """
    base = 10**digits
    first, second = pairs // base, pairs % base
    upwards = [(first + second) // 10**place % 10 for place in range(digits + 1)]
    downwards = [number // 10**place % 10 for number in (first, second) for place in reversed(range(digits))]
    return torch.stack(downwards + upwards, dim=1)


def batches(pairs: Tensor, arguments: argparse.Namespace, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Endless batches of random pairs; labels are the digits of the sums."""
    while True:
        chosen = pairs[torch.randint(len(pairs), (arguments.batch,), generator=generator)]
        tokens = sums(chosen, arguments.digits)
        labels = tokens.clone()
        labels[:, : 2 * arguments.digits] = -100
        yield {"input_ids": tokens, "labels": labels}


@torch.no_grad()
def accuracy(model: ReformerLMForCausalLM, pairs: Tensor, digits: int) -> tuple[float, Tensor]:
    """Share of sums with all digits right, and which: bool [N]. The model goes on from its own digits."""
    expected = sums(pairs, digits)
    tokens = expected[:, : 2 * digits]
    for _ in range(digits + 1):
        guess = model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1)
        tokens = torch.cat((tokens, guess.unsqueeze(1)), dim=1)
    right = (tokens == expected).all(dim=1)
    return float(right.float().mean()), right


def main(argv: list[str] | None = None) -> float:
    """Trains, and prints the accuracy on sums that were held out."""
    arguments = build_parser().parse_strictly(argv)
    if arguments.digits > 4:
        raise InputError(f"--digits is {arguments.digits}; give 1 to 4")
    if arguments.hidden_size % 4:
        raise InputError(f"--hidden_size is {arguments.hidden_size}; give a multiple of 4, the number of heads")
    generator = begin(arguments.seed)
    order = torch.randperm(10 ** (2 * arguments.digits), generator=generator)
    held_out = min(len(order) // 5, 500)
    tests, pairs = order[:held_out], order[held_out:]
    config = ReformerLMConfig(
        vocab_size=10, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers, num_attention_heads=4,
        max_position_embeddings=3 * arguments.digits + 1, bucket_size=4, position_type="absolute", reversible="off",
    )  # fmt: skip
    model = ReformerLMForCausalLM(config)
    data = batches(pairs, arguments, generator)
    fit(model, data, steps=arguments.steps, learning_rate=arguments.lr, progress=not arguments.quiet)
    known = pairs[:500]
    learned, _ = accuracy(model, known, arguments.digits)
    share, right = accuracy(model, tests, arguments.digits)
    base = 10**arguments.digits
    for pair in tests[~right][:3].tolist():
        print(f"wrong: {pair // base} + {pair % base}")
    said = f"{learned:.1%} of {len(known)} sums it may have seen, {share:.1%} of {held_out} held-out sums"
    print(f"all digits right: {said}")
    return share


if __name__ == "__main__":
    run(main)
