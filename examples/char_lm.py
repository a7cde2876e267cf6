"""A language model of the characters of any text file (nanoGPT's shakespeare_char job).

    python examples/char_lm.py
    python examples/char_lm.py --text my_book.txt --steps 2000

Every character is a token, capitals and newlines too; the last tenth of the text is for validation. For real corpora
there is train_reformer.py, which streams files of any size, resumes and scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from example import ROOT, begin, count, parser_of, run
from torch import Tensor

from reformer_lm import InputError, ReformerLMConfig, ReformerLMForCausalLM, TrainingWrapper
from reformer_lm.command_line import CommandLineParser
from reformer_lm.corpus.readers import Reading, read_articles
from reformer_lm.training.fitting import fit


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = parser_of(__doc__, steps=300, learning_rate=3e-3)
    parser.add_argument(
        "--text", type=Path, default=ROOT / "data" / "train.json", help=".txt, .json, .jsonl: what corpora may be"
    )
    parser.add_argument("--context", type=count, default=256, help="characters in a window")
    parser.add_argument("--batch", type=count, default=4, help="windows a step")
    parser.add_argument("--hidden_size", type=count, default=128, help="width of the model")
    parser.add_argument("--layers", type=count, default=3, help="of the model")
    parser.add_argument("--sample", type=count, default=200, help="characters to write at the end")
    return parser


def batches(tokens: Tensor, arguments: argparse.Namespace, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Endless windows from random places."""
    places = len(tokens) - arguments.context + 1
    while True:
        starts = torch.randint(places, (arguments.batch,), generator=generator)
        windows = torch.stack([tokens[start : start + arguments.context] for start in starts.tolist()])
        yield {"input_ids": windows, "labels": windows}


@torch.no_grad()
def validate(model: ReformerLMForCausalLM, tokens: Tensor, context: int, batch: int) -> float:
    """Mean nats a character over all whole windows."""
    windows = tokens.unfold(0, context, context)
    model.eval()
    total = sum(float(model(piece, labels=piece, skip_logits=True).loss) * len(piece) for piece in windows.split(batch))
    return total / len(windows)


def main(argv: list[str] | None = None) -> float:
    """Trains, and prints the validation loss and a sample."""
    arguments = build_parser().parse_strictly(argv)
    text = "\n".join(read_articles(arguments.text, Reading(txt_articles="file")))
    characters = sorted(set(text))
    ids = {character: token for token, character in enumerate(characters)}
    tokens = torch.tensor([ids[character] for character in text])
    border = len(tokens) * 9 // 10
    if len(tokens) - border < arguments.context:
        raise InputError(
            f"{arguments.text} has {len(tokens):,} characters; a tenth of them must fill a window: "
            f"give a longer text, or --context {max(2, (len(tokens) - border) // 2)}"
        )
    if arguments.hidden_size % 4:
        raise InputError(f"--hidden_size is {arguments.hidden_size}; give a multiple of 4, the number of heads")
    train, validation = tokens[:border], tokens[border:]
    generator = begin(arguments.seed)
    config = ReformerLMConfig(
        vocab_size=len(characters), hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers,
        num_attention_heads=4, max_position_embeddings=arguments.context, bucket_size=32,
        reversible_threshold=arguments.context, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ReformerLMForCausalLM(config)
    before = validate(model, validation, arguments.context, arguments.batch)
    data = batches(train, arguments, generator)
    fit(model, data, steps=arguments.steps, learning_rate=arguments.lr, progress=not arguments.quiet)
    after = validate(model, validation, arguments.context, arguments.batch)
    print(f"{len(tokens):,} characters, {len(characters):,} different ones")
    print(f"validation loss {before:.3f} before training, {after:.3f} after {arguments.steps} steps (nats a character)")
    written = TrainingWrapper(model).generate(validation[:16], arguments.sample, temperature=0.8)
    print("".join(characters[token] for token in [*validation[:16].tolist(), *written.tolist()]))
    return after


if __name__ == "__main__":
    run(main)
