"""The contenders of benchmarks/memory.py and train_step.py: whole models of one size, and their training step.

All have the same width, depth, heads and vocabulary and see the same random tokens; the LSH models have 4 hashes and
buckets of 64 tokens. A step is forward, loss of every token but the first, backward; the optimizer's part where it is
asked for. No dropout. Each model is otherwise at its own package's defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

BUCKET_SIZE = 64
HASHES = 4


class Sizes(NamedTuple):
    """What all contenders have in common.

    Attributes:
        tokens: T.
        hidden_size: width.
        depth: layers.
        heads: of the attention.
        vocab_size: number of tokens there are.
    """

    tokens: int
    hidden_size: int = 512
    depth: int = 6
    heads: int = 8
    vocab_size: int = 21128


def _ours(sizes: Sizes, **options: object) -> nn.Module:
    from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

    # Pieces of 8,192 tokens, as in configs/long.json.
    config = ReformerLMConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads, max_position_embeddings=sizes.tokens, bucket_size=BUCKET_SIZE,
        num_hashes=HASHES, **{"ff_chunk_size": 8192, **options},
    )  # fmt: skip
    return ReformerLMForCausalLM(config)


def _reformer_pytorch(sizes: Sizes) -> nn.Module:
    from reformer_pytorch import ReformerLM

    return ReformerLM(
        num_tokens=sizes.vocab_size, dim=sizes.hidden_size, depth=sizes.depth, max_seq_len=sizes.tokens,
        heads=sizes.heads, dim_head=sizes.hidden_size // sizes.heads, bucket_size=BUCKET_SIZE, n_hashes=HASHES,
        causal=True,
    )  # fmt: skip


def _gpt2(sizes: Sizes, checkpointing: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=sizes.vocab_size, n_positions=sizes.tokens, n_embd=sizes.hidden_size, n_layer=sizes.depth,
        n_head=sizes.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=1,
        eos_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if checkpointing:
        # Its name from transformers 5.2x on, and before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def _compiled(model: nn.Module) -> nn.Module:
    """With train_reformer.py's --compile."""
    from reformer_lm.training.models import compile_layers

    compile_layers(model)
    return model


def _own_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens).loss


def _loss_of_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _loss_in_pieces(model: nn.Module, tokens: Tensor) -> Tensor:
    """GPT-2's loss without its logits [T, vocabulary], which at 65,536 tokens take 5.5 GB three times over."""
    from reformer_lm.ops.loss import linear_cross_entropy

    hidden = model.transformer(tokens).last_hidden_state[0, :-1]
    return linear_cross_entropy(hidden, model.lm_head.weight, None, tokens[0, 1:]) / len(hidden)


class Contender(NamedTuple):
    """One way to train.

    Attributes:
        label: its name in tables and plots.
        package: the distribution that brings it.
        build: makes the model.
        loss: mean loss of tokens [1, T].
    """

    label: str
    package: str
    build: Callable[[Sizes], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]


CONTENDERS: dict[str, Contender] = {
    "ours": Contender("ours", "reformer_lm", _ours, _own_loss),
    "keep_attention": Contender(
        'ours, reversible="keep_attention"', "reformer_lm",
        lambda sizes: _ours(sizes, reversible="keep_attention"), _own_loss,
    ),
    "off": Contender(
        'ours, reversible="off"', "reformer_lm",
        lambda sizes: _ours(sizes, reversible="off", ff_chunk_size=0), _own_loss,
    ),
    "compiled": Contender("ours, --compile", "reformer_lm", lambda sizes: _compiled(_ours(sizes)), _own_loss),
    "reformer_pytorch": Contender("reformer-pytorch", "reformer-pytorch", _reformer_pytorch, _loss_of_logits),
    "gpt2": Contender("GPT-2 (SDPA)", "transformers", _gpt2, _own_loss),
    "gpt2_compiled": Contender(
        "GPT-2 (SDPA), --compile", "transformers", lambda sizes: _compiled(_gpt2(sizes)), _own_loss
    ),
    "gpt2_checkpointing": Contender(
        "GPT-2, gradient checkpointing", "transformers", lambda sizes: _gpt2(sizes, checkpointing=True), _own_loss
    ),
    "gpt2_lean": Contender(
        "GPT-2, gradient checkpointing, our loss", "transformers", lambda sizes: _gpt2(sizes, checkpointing=True),
        _loss_in_pieces,
    ),
}  # fmt: skip


class Trainee:
    """A model, its tokens and, once asked for, its optimizer.

    Args:
        name: a key of CONTENDERS.
        sizes: of the model.
        device: "cpu" or "cuda".
        bf16: whether forward and loss run under bfloat16 autocast.
    """

    def __init__(self, name: str, sizes: Sizes, device: str = "cpu", bf16: bool = False) -> None:
        torch.manual_seed(0)
        self.contender = CONTENDERS[name]
        self.model = self.contender.build(sizes).to(device).train()
        self.device, self.bf16 = device, bf16
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(sizes.vocab_size, (1, sizes.tokens), generator=generator).to(device)
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, tokens: int | None = None, update: bool = False) -> float:
        """One training step.

        Args:
            tokens: how many of the tokens; None for all.
            update: whether AdamW changes the weights.

        Returns:
            The loss.
        """
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.contender.loss(self.model, self.tokens[:, :tokens])
        loss.backward()
        if update:
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())
