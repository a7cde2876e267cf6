"""The same results on a GPU as on the CPU; run by `make test-cuda` where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from reformer_lm import LSHCache, ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.ops import lsh_flex
from reformer_lm.ops.hashing import hash_vectors, sample_rotations
from reformer_lm.ops.lsh import lsh_attention
from reformer_lm.training import main as train

pytestmark = pytest.mark.cuda

# Largest distance, relative in the 2-norm, of the flex backend from float64, and from the torch backend, which rounds
# more often. (With tf32 instead of float32 it would be 5e-4.)
FLEX_BOUND = {torch.float32: 5e-6, torch.float16: 0.002, torch.bfloat16: 0.02}
BACKENDS_BOUND = {torch.float32: 2e-5, torch.float16: 0.012, torch.bfloat16: 0.06}


@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("shifted", [0, 2])
def test_attention_equals_the_cpu(tokens: int, shifted: int) -> None:
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        qk, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator) for _ in range(2))
        buckets = hash_vectors(qk.to(device), sample_rotations(3, 8, 4, (6,), seed=0))
        qk, v = (x.to(device).requires_grad_() for x in (qk, v))
        out = lsh_attention(qk, v, buckets, window=16, num_shifted_heads=shifted) + 0.0 * (qk.sum() + v.sum())
        results.append([x.cpu() for x in (buckets, out, *torch.autograd.grad(out.sin().sum(), (qk, v)))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_reversible_gradients_equal_plain_autograd(dropout: float) -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
        bucket_size=8, hidden_dropout_prob=dropout, attention_dropout=dropout, activation_dropout=dropout,
    )  # fmt: skip
    model = ReformerLMForCausalLM(config).double().cuda()
    x = torch.randint(0, 31, (2, 200), device="cuda")
    gradients = []
    for threshold in (0, 1000):
        model.reformer.stack.reversible_threshold = threshold
        model.zero_grad()
        torch.manual_seed(1)
        model(x, labels=x).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


def test_logits_equal_the_cpu_but_for_hash_ties() -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = ReformerLMForCausalLM(config).double().eval()
    x = torch.randint(0, 100, (1, 2000))
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(model.cuda()(x.cuda()).logits.cpu(), expected, rtol=0, atol=1e-9)


def test_decoding_from_a_cache_equals_the_whole_forward_pass() -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        bucket_size=8,
    )  # fmt: skip
    model = ReformerLMForCausalLM(config).double().cuda().eval()
    tokens = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    cache = LSHCache(config)
    with torch.no_grad():
        expected = model(tokens).logits
        parts = [model(tokens[:, :200], past_key_values=cache).logits]
        parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(200, 300)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["--fp16", "--bf16", "--no_bf16"])
def test_the_trainer_trains(precision: str, tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data"
    config = tmp_path / "config.json"
    config.write_text(
        '{"model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"max_position_embeddings": 512}}'
    )
    arguments = [
        "--raw", "--raw_data_path", str(data / "train.json"), "--val_data_path", str(data / "val.json"),
        "--model_config", str(config), "--max_steps", "30", "--batch_size", "4", "--lr", "0.003", precision,
        "--tokenized_data_path", str(tmp_path / "tokens"), "--output_dir", str(tmp_path / "model"),
        "--writer_dir", str(tmp_path / "curves"), "--device", "cuda",
    ]  # fmt: skip
    assert train(arguments) == 0
    model = ReformerLMForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Matrix products of float32 without tf32, in the kernels, too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_inputs(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, *, rounds: int = 3, buckets: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    qk, v = (torch.randn(batch, heads, tokens, dim, generator=generator).to("cuda", dtype) for _ in range(2))
    hashed = hash_vectors(qk, sample_rotations(heads, dim, rounds, (buckets,), seed=0))
    return qk.requires_grad_(), v.requires_grad_(), hashed


def outputs_and_gradients(qk: Tensor, v: Tensor, buckets: Tensor, **options: object) -> tuple[Tensor, ...]:
    out = lsh_attention(qk, v, buckets, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).sin()
    # The added nothing makes gradients 0 that would be missing, as those of the query of a token without matches.
    return out, *torch.autograd.grad(out + 0.0 * (qk.sum() + v.sum()), (qk, v), weights.to(out.dtype))


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        reference = other.to(one.device, torch.float64)
        # Inputs are of order 1. A gradient that vanishes (a query with one key) leaves the rounding of what cancelled.
        scale = max(reference.norm().item(), 0.1 * reference.numel() ** 0.5)
        assert (one.double() - reference).norm().item() <= bound * scale


def assert_flex_equals_the_reference(qk: Tensor, v: Tensor, buckets: Tensor, **options: object) -> None:
    actual = outputs_and_gradients(qk, v, buckets, **options, backend="flex")
    assert all(x.dtype == qk.dtype for x in actual)
    # The oracle asks for one number at a time, which a GPU is slow to tell.
    exact = [x.detach().cpu().double().requires_grad_() for x in (qk, v)]
    expected = outputs_and_gradients(*exact, buckets.cpu(), **options, backend="reference")
    assert_close(actual, expected, FLEX_BOUND[qk.dtype])


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", FLEX_BOUND)
@pytest.mark.parametrize("shifted", [0, 1])
@pytest.mark.parametrize("tokens", [1, 2, 63, 127, 128, 129, 300])
def test_flex_equals_the_reference(tokens: int, shifted: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 2, tokens, 32, dtype)
    assert_flex_equals_the_reference(*inputs, window=16, num_shifted_heads=shifted)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("window", [1, 128, 129, 200, 10_000])
def test_flex_with_windows_shorter_and_longer_than_blocks_and_the_sequence(window: int) -> None:
    inputs = make_inputs(1, 2, 333, 32, torch.float32, buckets=2)
    assert_flex_equals_the_reference(*inputs, window=window, key_norm="unit")


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(16, torch.float32), (48, torch.float32), (64, torch.float32)]
    + [(dim, dtype) for dim in (16, 48, 64, 80, 128) for dtype in (torch.float16, torch.bfloat16)],
)
def test_flex_with_any_head_dimension_it_takes(dim: int, dtype: torch.dtype) -> None:
    assert_flex_equals_the_reference(*make_inputs(1, 2, 200, dim, dtype), window=64)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", FLEX_BOUND)
@pytest.mark.parametrize("tokens", [1, 128, 257])
def test_flex_with_all_tokens_in_one_bucket_and_each_in_its_own(tokens: int, dtype: torch.dtype) -> None:
    qk, v, hashed = make_inputs(1, 2, tokens, 32, dtype)
    assert_flex_equals_the_reference(qk, v, torch.zeros_like(hashed), window=100)
    alone = torch.arange(tokens, device="cuda").expand_as(hashed)
    assert_flex_equals_the_reference(qk, v, alone, window=100, num_shifted_heads=1)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", FLEX_BOUND)
@pytest.mark.parametrize("slice_elements", [1, 1 << 26])
def test_flex_equals_the_torch_backend(
    slice_elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsh_flex, "_SLICE_ELEMENTS", slice_elements)
    inputs = make_inputs(2, 3, 5001, 64, dtype, buckets=64)
    actual = outputs_and_gradients(*inputs, window=64, num_shifted_heads=1, backend="flex")
    expected = outputs_and_gradients(*inputs, window=64, num_shifted_heads=1, backend="torch")
    assert_close(actual, expected, BACKENDS_BOUND[dtype])


def test_flex_gives_the_same_bits_again() -> None:
    inputs = make_inputs(2, 3, 3001, 64, torch.bfloat16, buckets=32)
    first = outputs_and_gradients(*inputs, window=64, backend="flex")
    second = outputs_and_gradients(*inputs, window=64, backend="flex")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.usefixtures("full_precision")
def test_flex_keeps_rows_apart() -> None:
    qk, v, hashed = make_inputs(2, 2, 150, 32, torch.float32)
    alone = outputs_and_gradients(qk[:1].detach().requires_grad_(), v[:1].detach().requires_grad_(), hashed[:1],
                                  window=64, backend="flex")  # fmt: skip
    poisoned = [torch.cat((x[:1].detach(), torch.full_like(x[1:], torch.nan))) for x in (qk, v)]
    qk, v = (x.requires_grad_() for x in poisoned)
    out = lsh_attention(qk, v, hashed, window=64, backend="flex")
    weights = torch.linspace(-1, 1, out[:1].numel(), dtype=torch.float64, device="cuda").view_as(out[:1]).sin().float()
    grads = torch.autograd.grad(out, (qk, v), torch.cat((weights, weights)))
    assert_close((out[:1], *(x[:1] for x in grads)), alone, FLEX_BOUND[torch.float32])


@pytest.mark.usefixtures("full_precision")
def test_flex_under_autocast() -> None:
    inputs = make_inputs(1, 2, 300, 32, torch.float32)
    expected = outputs_and_gradients(*inputs, window=64, backend="flex")
    compiled = counters["stats"]["unique_graphs"]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = outputs_and_gradients(*inputs, window=64, backend="flex")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == compiled


def test_flex_is_compiled_once_for_all_lengths_and_batches() -> None:
    def run(batch: int, tokens: int) -> None:
        inputs = make_inputs(batch, 2, tokens, 32, torch.bfloat16)
        outputs_and_gradients(*inputs, window=64, backend="flex")
        with torch.no_grad():
            lsh_attention(*inputs, window=64, backend="flex")

    torch._dynamo.reset()
    counters.clear()
    run(1, 100)
    # Forward only, and forward with a backward pass.
    assert counters["stats"]["unique_graphs"] == 2
    for batch, tokens in ((1, 33), (2, 128), (1, 257), (3, 1000), (1, 4097), (1, 1)):
        run(batch, tokens)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("dtype", "dim", "dropout", "by_flex"),
    [
        (torch.bfloat16, 64, 0.0, True),
        (torch.float16, 64, 0.0, True),
        (torch.float32, 64, 0.0, True),
        (torch.float64, 64, 0.0, False),
        (torch.bfloat16, 8, 0.0, False),
        (torch.bfloat16, 64, 0.1, False),
    ],
)
def test_auto_picks_flex_where_it_can(
    dtype: torch.dtype, dim: int, dropout: float, by_flex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    attend_round = lsh_flex._attend_round

    def counted(*arguments: object) -> tuple[Tensor, Tensor]:
        rounds.append(1)
        return attend_round(*arguments)

    monkeypatch.setattr(lsh_flex, "_attend_round", counted)
    inputs = make_inputs(1, 2, 100, dim, dtype)
    lsh_attention(*inputs, window=64, dropout_p=dropout)
    assert len(rounds) == (3 if by_flex else 0)
    if not by_flex:
        with pytest.raises(ValueError, match="flex"):
            lsh_attention(*inputs, window=64, dropout_p=dropout, backend="flex")


def test_flex_with_a_million_tokens_in_memory_linear_in_their_number() -> None:
    heads, slice_tokens = 4, lsh_flex._SLICE_ELEMENTS // 64
    for tokens in (1 << 18, 1 << 20):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator("cuda").manual_seed(0)
        qk, v = (
            torch.randn(1, heads, tokens, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
            for _ in range(2)
        )
        buckets = torch.randint(0, tokens // 64, (1, heads, 4, tokens), device="cuda", generator=generator)
        out = lsh_attention(qk, v, buckets, window=64, num_shifted_heads=1, backend="flex")
        grads = torch.autograd.grad(out, (qk, v), torch.ones_like(out))
        # Bytes for each token and head: vectors, output and their gradients 768, buckets and order of 4 rounds 160, and
        # what sorting needs. Bytes for each token of the slice at work: sorted copies of one round, sums in float32.
        bound = 2048 * heads * tokens + 6144 * min(heads * tokens, slice_tokens)
        assert torch.cuda.max_memory_allocated() - before < bound
        assert all(x.isfinite().all() for x in (out, *grads))
        with torch.no_grad():
            expected = lsh_attention(qk, v, buckets, window=64, num_shifted_heads=1, backend="torch")
        assert_close((out,), (expected,), BACKENDS_BOUND[torch.bfloat16])
        del qk, v, buckets, out, grads, expected
