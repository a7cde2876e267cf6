"""Names of tensors in reformer-pytorch's ReformerLM and in our model, both ways."""

from __future__ import annotations

import re

from reformer_lm.config import ReformerLMConfig

# Within reformer.layers.blocks.N there, reformer.stack.layers.N here.
_OF_LAYER = {
    "f.net.fn.toqk.weight": "attention.query_key.weight",
    "f.net.fn.tov.weight": "attention.value.weight",
    "f.net.fn.to_out.weight": "attention.output.weight",
    "f.net.fn.to_out.bias": "attention.output.bias",
    "f.net.fn.mem_kv": "attention.memory",
    "g.net.fn.fn.w1.weight": "feed_forward.inner.weight",
    "g.net.fn.fn.w1.bias": "feed_forward.inner.bias",
    "g.net.fn.fn.w2.weight": "feed_forward.output.weight",
    "g.net.fn.fn.w2.bias": "feed_forward.output.bias",
    # Where it is a product-key memory.
    "g.net.fn.to_queries.weight": "feed_forward.queries.weight",
    "g.net.fn.norm.weight": "feed_forward.query_norm.weight",
    "g.net.fn.norm.bias": "feed_forward.query_norm.bias",
    "g.net.fn.keys": "feed_forward.keys",
    "g.net.fn.values.weight": "feed_forward.values.weight",
}
# The same, by norm_type.
_OF_NORMS = {
    "layernorm": {
        "f.net.norm.weight": "attention_norm.weight",
        "f.net.norm.bias": "attention_norm.bias",
        "g.net.norm.weight": "feed_forward_norm.weight",
        "g.net.norm.bias": "feed_forward_norm.bias",
    },
    "scalenorm": {"f.net.norm.g": "attention_norm.weight", "g.net.norm.g": "feed_forward_norm.weight"},
    "rezero": {"f.net.g": "attention_gate.weight", "g.net.g": "feed_forward_gate.weight"},
}
_OUTSIDE = {
    "token_emb.weight": "reformer.token_embedding.weight",
    "to_model_dim.weight": "reformer.embedding_projection.weight",
    "to_model_dim.bias": "reformer.embedding_projection.bias",
    "pos_emb.weights.0": "reformer.position_embedding.axial.weights.0",
    "pos_emb.weights.1": "reformer.position_embedding.axial.weights.1",
    "pos_emb.emb.weight": "reformer.position_embedding.absolute.weight",
    "norm.weight": "reformer.norm.weight",
    "norm.bias": "reformer.norm.bias",
    "out.0.weight": "head_projection.weight",
    "out.0.bias": "head_projection.bias",
    "out.1.weight": "lm_head.weight",
    "out.1.bias": "lm_head.bias",
}
_THEIR_LAYER = re.compile(r"reformer\.layers\.blocks\.(\d+)\.(.+)")
_OUR_LAYER = re.compile(r"reformer\.stack\.layers\.(\d+)\.(.+)")
# Of layers with weight_tie, what each of them has for itself.
_OWN = ("f.net.norm.", "g.net.norm.", "f.net.g", "g.net.g")


def our_name(theirs: str) -> str | None:
    """Our name of a parameter of ReformerLM, None if it is none."""
    match = _THEIR_LAYER.fullmatch(theirs)
    if match is None:
        return _OUTSIDE.get(theirs)
    for table in (_OF_LAYER, *_OF_NORMS.values()):
        if match[2] in table:
            return f"reformer.stack.layers.{match[1]}.{table[match[2]]}"
    return None


def their_name(ours: str, config: ReformerLMConfig) -> str:
    """ReformerLM's name of a parameter of our model with a configuration that has a counterpart there."""
    match = _OUR_LAYER.fullmatch(ours)
    if match is None:
        return _inverse(_OUTSIDE)[ours]
    table = _inverse(_OF_LAYER | _OF_NORMS[config.norm_type])
    return f"reformer.layers.blocks.{match[1]}.{table[match[2]]}"


def in_first_layer(theirs: str) -> str:
    """The name of the tensor that holds a layer's weight where all layers share the first one's."""
    match = _THEIR_LAYER.fullmatch(theirs)
    if match is None or match[2].startswith(_OWN):
        return theirs
    return f"reformer.layers.blocks.0.{match[2]}"


def of_irreversible_twin(theirs: str) -> str:
    """ReformerLM has each block's parameters under two names; gives the second one for the first."""
    match = _THEIR_LAYER.fullmatch(theirs)
    if match is None:
        return theirs
    block, _, rest = match[2].partition(".net.")
    return f"reformer.layers.irrev_blocks.{match[1]}.{block}.{rest}"


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}
