"""A language model of two tokens and a context of three, seen whole: it is a Markov chain of eight states.

    python examples/baby_gpt.py

With tokens 0 and 1 and a context of 3 a model can be in 8 states only, and from each it goes on to 2: all that it
does is 16 probabilities. The picture shows them before and after training on a short sequence (the idea is Andrej
Karpathy's baby GPT; the model is a Reformer).
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from example import begin, count, parser_of, run

from reformer_lm import InputError, ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.command_line import CommandLineParser
from reformer_lm.training.fitting import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTEXT = 3
STATES = list(itertools.product((0, 1), repeat=CONTEXT))
# Where the states stand: what leads into each other is side by side, 000 and 111 are the ends.
PLACES = {
    (0, 0, 0): (-3.6, 0.0), (0, 0, 1): (-2.0, 1.5), (1, 0, 0): (-2.0, -1.5), (0, 1, 0): (-0.9, 0.0),
    (1, 0, 1): (0.9, 0.0), (0, 1, 1): (2.0, 1.5), (1, 1, 0): (2.0, -1.5), (1, 1, 1): (3.6, 0.0),
}  # fmt: skip
# Told apart also without colours, by what is written on them. After Okabe and Ito.
COLOURS = {0: "#0072B2", 1: "#D55E00"}


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = parser_of(__doc__, steps=50, learning_rate=1e-2)
    parser.add_argument("--sequence", default="111101111011110", help="zeros and ones to train on")
    parser.add_argument("--hidden_size", type=count, default=16, help="width of the model")
    parser.add_argument("--picture", type=Path, help="PNG to write; needs matplotlib")
    return parser


@torch.no_grad()
def transitions(model: ReformerLMForCausalLM) -> dict[tuple[int, ...], list[float]]:
    """The probabilities of 0 and of 1 after each state."""
    probabilities = model.eval()(torch.tensor(STATES), logits_to_keep=1).logits[:, -1].softmax(-1)
    return dict(zip(STATES, probabilities.tolist(), strict=True))


def _arrow(axes: Axes, nodes: dict[tuple[int, ...], Any], state: tuple[int, ...], token: int, share: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    target = (*state[1:], token)
    (x0, y0), (x1, y1) = PLACES[state], PLACES[target]
    look = {
        "arrowstyle": "-|>", "mutation_scale": 13, "color": COLOURS[token], "linewidth": 0.9 + 2.6 * share,
        "alpha": 0.35 + 0.65 * share,
    }  # fmt: skip
    if state == target:
        side = math.copysign(1, x0)
        ends = ((x0 + 0.3 * side, 0.22), (x0 + 0.3 * side, -0.22))
        arrow = FancyArrowPatch(*ends, connectionstyle=f"arc3,rad={-2.2 * side:g}", shrinkA=0, shrinkB=0, **look)
        label = (x0 + 1.0 * side, 0.0)
    else:
        # Outwards where an arrow would else run into the states of the middle.
        bend = -0.3 if x0 == x1 else 0.14
        arrow = FancyArrowPatch(
            (x0, y0), (x1, y1), connectionstyle=f"arc3,rad={bend}", patchA=nodes[state], patchB=nodes[target], **look
        )
        label = ((x0 + x1) / 2 + bend * (y1 - y0) / 2, (y0 + y1) / 2 - bend * (x1 - x0) / 2)
    axes.add_patch(arrow)
    axes.text(
        *label, f"{100 * share:.0f}%", color=COLOURS[token], fontsize=10, ha="center", va="center", zorder=6,
        bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def draw(before: dict[tuple[int, ...], list[float]], after: dict[tuple[int, ...], list[float]], path: Path) -> None:
    """Draws the chain before and after training, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Circle

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 4), dpi=110)
    for axes, chain, title in zip(panels, (before, after), ("before training", "after training"), strict=True):
        nodes = {
            state: Circle(place, 0.38, facecolor="#F2F2F2", edgecolor="#4D4D4D", zorder=5)
            for state, place in PLACES.items()
        }
        for state, node in nodes.items():
            axes.add_patch(node)
            name = "".join(map(str, state))
            axes.text(*PLACES[state], name, ha="center", va="center", fontsize=12, family="monospace", zorder=6)
        for state, probabilities in chain.items():
            for token, probability in enumerate(probabilities):
                _arrow(axes, nodes, state, token, probability)
        axes.set_title(title, fontsize=12)
        axes.set_xlim(-5.0, 5.0)
        axes.set_ylim(-2.1, 2.1)
        axes.set_aspect("equal")
        axes.axis("off")
    figure.text(0.5, 0.03, "probability that the next token is 0 (blue) or 1 (orange)", ha="center", fontsize=11)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.07, wspace=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[tuple[int, ...], list[float]]:
    """Trains, prints the 16 probabilities and draws them."""
    arguments: argparse.Namespace = build_parser().parse_strictly(argv)
    text = arguments.sequence
    if len(text) <= CONTEXT or set(text) - {"0", "1"}:
        raise InputError(f"--sequence is {text!r}; give more than {CONTEXT} zeros and ones")
    if arguments.hidden_size % 4:
        raise InputError(f"--hidden_size is {arguments.hidden_size}; give a multiple of 4, the number of heads")
    begin(arguments.seed)
    config = ReformerLMConfig(
        vocab_size=2, hidden_size=arguments.hidden_size, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bucket_size=2, position_type="absolute", reversible="off",
    )  # fmt: skip
    model = ReformerLMForCausalLM(config)
    windows = torch.tensor([int(character) for character in text]).unfold(0, CONTEXT + 1, 1)
    # Only what follows a whole context is to be learned.
    targets = torch.full((len(windows), CONTEXT), -100)
    targets[:, -1] = windows[:, -1]
    batch = {"input_ids": windows[:, :-1], "shift_labels": targets}
    before = transitions(model)
    losses = fit(
        model, itertools.repeat(batch), steps=arguments.steps, learning_rate=arguments.lr, progress=not arguments.quiet
    )
    after = transitions(model)
    seen = [tuple(window) for window in windows.tolist()]
    print("state  1 follows in the text  before  after")
    for state in STATES:
        times = sum(window[:-1] == state for window in seen)
        ones = f"{seen.count((*state, 1))} of {times}" if times else "never there"
        print(f"{''.join(map(str, state))}    {ones:>21}  {before[state][1]:6.1%}  {after[state][1]:6.1%}")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {arguments.steps} steps")
    if arguments.picture:
        draw(before, after, arguments.picture)
        print(arguments.picture)
    return after


if __name__ == "__main__":
    run(main)
