"""Every knob of the model, checked on construction."""

from __future__ import annotations

import math
from typing import Any, get_args

from transformers import PreTrainedConfig

from reformer_lm.config_checks import check_positions, impossible, require_choice, require_count
from reformer_lm.ops.hashing import factorize_buckets
from reformer_lm.ops.keys import KeyNorm

FEED_FORWARD_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu", "reglu")
POSITION_TYPES = ("axial", "rotary", "absolute", "sinusoidal", "none")
NORM_TYPES = ("layernorm", "scalenorm", "rezero")
STREAM_MERGES = ("mean", "concatenate")


class ReformerLMConfig(PreTrainedConfig):
    """Configuration of a Reformer language model.

    Sizes:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width of the two residual streams.
        num_hidden_layers: reversible layers, each one attention and one feed-forward block.
        num_attention_heads: heads of the attention.
        head_dim: width of one head; None means hidden_size / num_attention_heads.
        intermediate_size: width of the feed-forward block; None means 4 * hidden_size.
        embedding_size: width of a factorised token embedding, projected to hidden_size; None means hidden_size.
        max_position_embeddings: longest sequence, in tokens.

    LSH attention (Kitaev et al. 2020, section 2):
        bucket_size: tokens a bucket holds at full length.
        lsh_window: the most recent earlier tokens of its bucket that a token sees per round; None means bucket_size.
        num_hashes: hash rounds.
        num_buckets: buckets per round, even; None means max_position_embeddings / bucket_size rounded up to even
            (with lsh_mask="chunked": the current length / bucket_size, as reformer-pytorch does). Above 128 it is
            rounded up to a product of two even factors, each hashed by a rotation of its own. A list gives the
            factors, whatever their size (the first one counts most in the order of the buckets).
        lsh_mask: "causal", exactly causal; or "chunked", the fixed chunks of reformer-pytorch and transformers.
        causal: whether a token sees only what stands before it; False, with lsh_mask="chunked" alone, is a
            bidirectional encoder, for masked language models and the source of an encoder-decoder.
        key_norm: length of the shared keys, "rms" (sqrt(head_dim)), "rms_eps" (the same, but for 1e-6 added to the
            mean square, as in trax and transformers) or "unit" (1, as in reformer-pytorch).
        rehash: "fixed" rotations, or fresh ones at each training "step".
        hash_seed: seed of the rotations, together with the layer's index.
        num_shifted_heads: LSH heads that read the value that *followed* a match; a number, or a list with one per
            layer; None means all LSH heads with lsh_mask="causal" and none with "chunked".
        allow_duplicate_attention: whether a key met in several rounds counts once for each (the peers' default), or
            once only (the paper's N_ij).
        num_mem_kv: learned memory vectors per layer that every token of the LSH heads sees.
        full_attention_threshold: with "causal", the first so many positions of any sequence attend to all earlier
            tokens (position by position, so the model stays exactly causal); with "chunked", sequences up to this
            length use full attention.
        attend_across_buckets: "chunked" only: whether a token sees other buckets of its two chunks.
        one_value_head: whether all heads read the same values, from a projection of one head's width.
        attention_output_bias: whether the attention's output projection has a bias.
        sort_padding: "chunked" only: whether padding is hashed and sorted with the tokens, as in reformer-pytorch,
            where it moves the chunks. Otherwise each row of a batch gets what it gets alone, rows of one length
            together. None means that it is where the model is causal.

    Local heads:
        num_local_heads: heads with windowed attention; a number, or a list with one per layer (layers of local heads
            alone are allowed, as in Google's local, local, LSH, local); None means half of them.
        local_window: tokens a local head sees, itself included; None means 2 * bucket_size.
        local_keys: "separate", a key projection of their own; or "shared", keys are the normalised queries.
        local_rotary: whether local heads use rotary positions.

    Positions:
        position_type: "axial", "rotary" (on the LSH heads' shared vectors), "absolute", "sinusoidal", or "none" (what
            the local heads' rotary positions and causality tell must do).
        axial_shape: the two factors of the position grid, their product at least max_position_embeddings; None
            means [max_position_embeddings / bucket_size rounded up, bucket_size].
        axial_dims: widths of the two parts, concatenated, adding up to the embedding's width; None means that both
            parts have the full width and are summed.

    Blocks:
        share_layer_weights: whether all layers have the first one's attention and feed-forward weights. Norms, gates
            and hash rotations stay their own.
        norm_type: "layernorm", "scalenorm" or "rezero" (a learned factor, starting at 0, in place of a norm).
        layer_norm_eps: epsilon of the norms.
        ff_activation: "gelu", "gelu_tanh", "relu", "silu", or the gated "geglu", "swiglu", "reglu".
        ff_chunk_size: tokens per piece of the feed-forward block; 0 means all at once.
        product_key_layers: layers, from 0, whose feed-forward block is a product-key memory (Lample et al. 2019).
        product_keys: half keys in each of its two sets; it has their square of values.
        attn_chunks: groups of heads that attention works off one after the other, so that what it computes for the
            backward pass exists for one group at a time.
        reversible: what training keeps for the backward pass: "full", of all layers only the last one's output;
            "keep_attention", also what each layer's LSH heads computed, so that they need not run again; "off", every
            activation (plain autograd).
        reversible_threshold: sequences up to this many tokens keep every activation, whatever ``reversible`` says.
        hidden_dropout_prob: dropout after the embedding and after each block.
        activation_dropout: dropout inside the feed-forward block.
        attention_dropout: dropout of attention weights.
        layer_dropout: probability of skipping a layer in a training step.

    Head and initialisation:
        merge_streams: what the last norm and the output layer see of the two residual streams: their "mean", or both,
            "concatenate"d, twice as wide (as in trax and transformers).
        tie_word_embeddings: whether the output matrix is the token embedding.
        lm_head_bias: whether the output layer has a bias.
        unit_output_vectors: whether the output matrix's rows are scaled to length 1 (reformer-pytorch's tied output).
        initializer_range: standard deviation of the initial weights of linear layers; those that write into the
            residual streams get initializer_range / sqrt(2 * num_hidden_layers), as in GPT-2, positions a quarter.
            Token embeddings start with length 1, standard deviation 1 / sqrt(embedding_size); where they are tied
            to the output, the last norm's scales start at +1 or -1 at random.

    Raises:
        ValueError: on an impossible combination, naming the field, its value and the remedy.
    """

    model_type = "reformer_lm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 21128,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        embedding_size: int | None = None,
        max_position_embeddings: int = 4096,
        bucket_size: int = 64,
        lsh_window: int | None = None,
        num_hashes: int = 4,
        num_buckets: int | list[int] | None = None,
        lsh_mask: str = "causal",
        causal: bool = True,
        key_norm: KeyNorm = "rms",
        rehash: str = "fixed",
        hash_seed: int = 0,
        num_shifted_heads: int | list[int] | None = None,
        allow_duplicate_attention: bool = True,
        num_mem_kv: int = 0,
        full_attention_threshold: int = 0,
        attend_across_buckets: bool = True,
        one_value_head: bool = False,
        attention_output_bias: bool = True,
        sort_padding: bool | None = None,
        num_local_heads: int | list[int] | None = None,
        local_window: int | None = None,
        local_keys: str = "separate",
        local_rotary: bool = True,
        position_type: str = "axial",
        axial_shape: list[int] | None = None,
        axial_dims: list[int] | None = None,
        share_layer_weights: bool = False,
        norm_type: str = "layernorm",
        layer_norm_eps: float = 1e-5,
        ff_activation: str = "gelu",
        ff_chunk_size: int = 0,
        product_key_layers: list[int] | tuple[int, ...] = (),
        product_keys: int = 128,
        attn_chunks: int = 1,
        reversible: str = "full",
        reversible_threshold: int = 0,
        hidden_dropout_prob: float = 0.0,
        activation_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_dropout: float = 0.0,
        merge_streams: str = "mean",
        tie_word_embeddings: bool = True,
        lm_head_bias: bool = False,
        unit_output_vectors: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.embedding_size = embedding_size
        self.max_position_embeddings = max_position_embeddings
        self.bucket_size = bucket_size
        self.lsh_window = lsh_window
        self.num_hashes = num_hashes
        self.num_buckets = _own_list(num_buckets)
        self.lsh_mask = lsh_mask
        self.causal = causal
        self.key_norm = key_norm
        self.rehash = rehash
        self.hash_seed = hash_seed
        self.num_shifted_heads = _own_list(num_shifted_heads)
        self.allow_duplicate_attention = allow_duplicate_attention
        self.num_mem_kv = num_mem_kv
        self.full_attention_threshold = full_attention_threshold
        self.attend_across_buckets = attend_across_buckets
        self.one_value_head = one_value_head
        self.attention_output_bias = attention_output_bias
        self.sort_padding = sort_padding
        self.num_local_heads = _own_list(num_local_heads)
        self.local_window = local_window
        self.local_keys = local_keys
        self.local_rotary = local_rotary
        self.position_type = position_type
        self.axial_shape = None if axial_shape is None else list(axial_shape)
        self.axial_dims = None if axial_dims is None else list(axial_dims)
        self.share_layer_weights = share_layer_weights
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.ff_activation = ff_activation
        self.ff_chunk_size = ff_chunk_size
        self.product_key_layers = list(product_key_layers)
        self.product_keys = product_keys
        self.attn_chunks = attn_chunks
        self.reversible = reversible
        self.reversible_threshold = reversible_threshold
        self.hidden_dropout_prob = hidden_dropout_prob
        self.activation_dropout = activation_dropout
        self.attention_dropout = attention_dropout
        self.layer_dropout = layer_dropout
        self.merge_streams = merge_streams
        self.tie_word_embeddings = tie_word_embeddings
        self.lm_head_bias = lm_head_bias
        self.unit_output_vectors = unit_output_vectors
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        self._resolve()
        super().__init__(**kwargs)

    @property
    def bucket_factors(self) -> tuple[int, ...] | None:
        """Buckets of each rotation of one hash round; None where their number follows the current length."""
        if isinstance(self.num_buckets, list):
            return tuple(self.num_buckets)
        return None if self.num_buckets is None else factorize_buckets(self.num_buckets)

    @property
    def buckets_per_round(self) -> int | None:
        """Product of the `bucket_factors`; None where the number of buckets follows the current length."""
        return None if self.bucket_factors is None else math.prod(self.bucket_factors)

    @property
    def output_width(self) -> int:
        """Width of the last norm."""
        return self.hidden_size * (2 if self.merge_streams == "concatenate" else 1)

    @property
    def sorts_padding(self) -> bool:
        """Whether padding is hashed and sorted with the tokens in chunked mode."""
        # Not written into ``sort_padding``: a causal model's weights may be loaded into an encoder.
        return self.causal if self.sort_padding is None else self.sort_padding

    def local_heads_of(self, layer_index: int) -> int:
        """How many of a layer's heads are local; they come first."""
        assert self.num_local_heads is not None
        return _of_layer(self.num_local_heads, layer_index)

    def shifted_heads_of(self, layer_index: int) -> int:
        """How many of a layer's LSH heads read what followed a match; they come last."""
        assert self.num_shifted_heads is not None
        return _of_layer(self.num_shifted_heads, layer_index)

    def _check(self) -> None:
        for name in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings bucket_size "
            "num_hashes attn_chunks product_keys"
        ).split():
            require_count(name, getattr(self, name), 1)
        for name in "head_dim intermediate_size embedding_size local_window lsh_window".split():
            require_count(name, getattr(self, name), 1, optional=True)
        for name in "full_attention_threshold reversible_threshold ff_chunk_size num_mem_kv".split():
            require_count(name, getattr(self, name), 0)
        require_choice("lsh_mask", self.lsh_mask, ("causal", "chunked"))
        require_choice("key_norm", self.key_norm, get_args(KeyNorm))
        require_choice("merge_streams", self.merge_streams, STREAM_MERGES)
        require_choice("rehash", self.rehash, ("fixed", "step"))
        require_choice("reversible", self.reversible, ("full", "keep_attention", "off"))
        require_choice("local_keys", self.local_keys, ("separate", "shared"))
        require_choice("position_type", self.position_type, POSITION_TYPES)
        require_choice("norm_type", self.norm_type, NORM_TYPES)
        require_choice("ff_activation", self.ff_activation, FEED_FORWARD_ACTIVATIONS)
        for name in "hidden_dropout_prob activation_dropout attention_dropout layer_dropout".split():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                raise impossible(name, getattr(self, name), "give a probability of at least 0 and below 1")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise impossible(
                "hidden_size",
                self.hidden_size,
                f"make it a multiple of num_attention_heads ({self.num_attention_heads}), or give head_dim",
            )
        factors = self.num_buckets if isinstance(self.num_buckets, list) else [self.num_buckets]
        if not factors or any(factor is not None and (factor < 2 or factor % 2) for factor in factors):
            raise impossible("num_buckets", self.num_buckets, "give an even number of at least 2, or a list of such")
        if not set(self.product_key_layers) <= set(range(0 if self.share_layer_weights else self.num_hidden_layers)):
            remedy = "give indices of layers, and none with share_layer_weights=True"
            raise impossible("product_key_layers", self.product_key_layers, remedy)
        if not self.causal and self.lsh_mask != "chunked":
            raise impossible("causal", self.causal, 'set lsh_mask="chunked", which alone has a bidirectional form')
        self._check_heads()
        check_positions(
            self.position_type,
            self.embedding_size or self.hidden_size,
            self.max_position_embeddings,
            self.axial_shape,
            self.axial_dims,
        )

    def _check_heads(self) -> None:
        heads = self.num_attention_heads
        for name in ("num_local_heads", "num_shifted_heads"):
            given = getattr(self, name)
            if isinstance(given, list) and len(given) != self.num_hidden_layers:
                raise impossible(
                    name, given, f"give one number per layer (num_hidden_layers is {self.num_hidden_layers})"
                )
        for layer in range(self.num_hidden_layers):
            local = _of_layer(self.num_local_heads, layer)
            if local is None:
                local = heads // 2
            if not 0 <= local <= heads:
                raise impossible("num_local_heads", self.num_local_heads, f"give 0 to num_attention_heads ({heads})")
            shifted = _of_layer(self.num_shifted_heads, layer)
            if shifted is not None and not 0 <= shifted <= heads - local:
                raise impossible(
                    "num_shifted_heads",
                    self.num_shifted_heads,
                    f"give 0 to {heads - local}, the heads of layer {layer} that are not local ({local} are)",
                )
            if shifted and not self.causal:
                remedy = "give 0, or None: with causal=False what follows a match can be the token itself"
                raise impossible("num_shifted_heads", self.num_shifted_heads, remedy)
        if self.share_layer_weights and isinstance(self.num_local_heads, list) and len(set(self.num_local_heads)) > 1:
            remedy = "give all layers as many with share_layer_weights=True"
            raise impossible("num_local_heads", self.num_local_heads, remedy)
        dim = self.head_dim or self.hidden_size // heads
        has_local = self.num_local_heads is None and heads > 1 or bool(_most(self.num_local_heads))
        rotates = (self.local_rotary and has_local) or self.position_type == "rotary"
        if rotates and dim % 2:
            raise impossible(
                "head_dim",
                dim,
                'make it even for rotary positions, or set local_rotary=False and position_type="axial"',
            )

    def _resolve(self) -> None:
        """Writes the defaults that depend on other fields, so that a saved config says them all."""
        heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.local_window is None:
            self.local_window = 2 * self.bucket_size
        if self.num_local_heads is None:
            self.num_local_heads = heads // 2
        if self.lsh_window is None:
            self.lsh_window = self.bucket_size
        if self.num_shifted_heads is None:
            local = self.num_local_heads
            if self.lsh_mask == "chunked":
                self.num_shifted_heads = 0
            else:
                self.num_shifted_heads = [heads - n for n in local] if isinstance(local, list) else heads - local
        if self.position_type == "axial" and self.axial_shape is None:
            self.axial_shape = [math.ceil(self.max_position_embeddings / self.bucket_size), self.bucket_size]
        if self.num_buckets is None and self.lsh_mask == "causal":
            # A constant of the model, never of the current length: a prefix must hash as it does in the whole.
            self.num_buckets = max(2, math.ceil(self.max_position_embeddings / self.bucket_size / 2) * 2)
        if isinstance(self.num_buckets, int):
            self.num_buckets = math.prod(factorize_buckets(self.num_buckets))


def _own_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _of_layer(value: Any, layer_index: int) -> Any:
    """The entry of a layer, where there is one per layer."""
    return value[layer_index] if isinstance(value, list) else value


def _most(value: Any) -> Any:
    return max(value) if isinstance(value, list) else value
