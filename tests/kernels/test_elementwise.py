"""Norms, rotation, cache writes, activations and argmax against the reference. One bfloat16 step apart at most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.kernels.interface import Batch, HeadTransform, Scores
from fastserve.kernels.quant import int8_kv_views
from fastserve.kernels.reference import Kernels
from tests.kernels.conftest import cache_rows, native_kernels

REFERENCE = Kernels()
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(result: Tensor, expected: Tensor, floor: float = 0.1) -> None:
    """Relative to each value, but at least to `floor`."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    step = 6e-6 if expected.dtype is torch.float32 else 2**-7
    limit = step * expected.float().abs().clamp(min=floor)
    assert ((result.float() - expected.float()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
@pytest.mark.parametrize("size", [1, 16, 33, 128, 1024])
def test_norms(isa: str, dtype: torch.dtype, size: int) -> None:
    kernels = native_kernels(isa)
    weight, bias = random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
    for x in (
        random(5, size, dtype=dtype),
        random(3, 7, size + 4, dtype=dtype)[:, 1:4, :size],
        random(size, dtype=dtype),
    ):
        assert_near(kernels.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
        if size > 1:
            assert_near(kernels.layer_norm(x, weight, bias, 1e-5), REFERENCE.layer_norm(x, weight, bias, 1e-5))
            assert_near(kernels.layer_norm(x, weight, None, 1e-5), REFERENCE.layer_norm(x, weight, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (128, 128), (80, 32), (20, 20), (36, 10)])
def test_rope(isa: str, dtype: torch.dtype, size: int, rotated: int) -> None:
    kernels = native_kernels(isa)
    x = random(9, 6, size, dtype=dtype)[:, 1:5]
    angles = random(9, rotated // 2, seed=3)
    cos, sin = angles.cos(), angles.sin()
    assert_near(kernels.apply_rope(x, cos, sin), REFERENCE.apply_rope(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(isa: str, dtype: torch.dtype, name: str) -> None:
    """Those of a linear; here of one that leaves its inputs as they are."""
    kernels = native_kernels(isa)

    def activation(x: Tensor, kind: str) -> Tensor:
        return kernels.linear(kernels.pack_linear(torch.eye(x.shape[1], dtype=x.dtype), None), x, kind)

    def gated_activation(x: Tensor) -> Tensor:
        return kernels.linear(kernels.pack_linear(torch.eye(x.shape[1], dtype=x.dtype), None, is_gated=True), x, name)

    for size in (2, 30, 250):
        x = 4 * random(3, size, dtype=dtype)
        # In float64: PyTorch's float32 gelu loses its small values to cancellation.
        wide = x.double() if dtype is torch.float32 else x
        assert_near(activation(x, name), REFERENCE.activation(wide, name).to(dtype))
        assert_near(gated_activation(x), REFERENCE.gated_activation(wide, name).to(dtype), floor=3.0)
    extremes = torch.tensor([[-1e30, -100.0, -0.0, 0.0, 100.0, 1e30]])
    assert_near(activation(extremes, name), REFERENCE.activation(extremes, name))
    assert activation(torch.full((1, 3), float("nan")), name).isnan().all()
    with pytest.raises(ConfigError, match="swish"):
        activation(x, "swish")


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=["cache32", "cache16"])
def test_cache_writes(isa: str, cache_dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    merged = random(6, 9, 40)
    slots = torch.tensor([7, 0, 30, 31, 2, 19])
    caches = [[torch.zeros(4, 8, 2, 40, dtype=cache_dtype) for _ in range(2)] for _ in range(2)]
    # As they come, and with rows that are not contiguous, of which a copy is stored.
    for heads in (merged, random(6, 40, 9, seed=1).transpose(1, 2)):
        key, value = heads[:, 4:6], heads[:, 7:9]
        kernels.store_kv(key, value, *caches[0], slots)
        REFERENCE.store_kv(key, value, *caches[1], slots)
        for ours, theirs, is_keys in zip(*caches, (True, False), strict=True):
            assert torch.equal(cache_rows(ours, is_keys=is_keys), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=["cache32", "cache16"])
@pytest.mark.parametrize(
    ("size", "rotated", "is_normed"), [(64, 64, True), (80, 32, True), (20, 20, False), (36, 0, True)]
)
def test_heads_in_one_operation_are_the_operations_one_by_one(
    isa: str, dtype: torch.dtype, cache_dtype: torch.dtype, size: int, rotated: int, is_normed: bool
) -> None:
    kernels = native_kernels(isa)
    merged = random(6, 9, size, dtype=dtype)
    query, key, value = merged.split((5, 2, 2), dim=1)
    angles = random(40, rotated // 2, seed=3)
    norms = [random(size, dtype=dtype, seed=seed) if is_normed else None for seed in (1, 2)]
    tables = (angles.cos(), angles.sin()) if rotated else (None, None)
    transform = HeadTransform(*norms, 1e-6, *tables, torch.tensor([0, 39, 7, 7, 1, 20]))
    slots = torch.tensor([7, 0, 30, 31, 2, 19])

    def run(operations: Kernels, *, fused: bool) -> tuple[Tensor, ...]:
        caches = [torch.zeros(4, 8, 2, size, dtype=cache_dtype) for _ in range(2)]
        owner = type(operations) if fused else Kernels
        return owner.transform_and_store(operations, query, key, value, transform, *caches, slots), *caches

    fused = run(kernels, fused=True)
    for ours, theirs in zip(fused, run(kernels, fused=False), strict=True):
        assert torch.equal(ours, theirs)
    native = fused[0], cache_rows(fused[1], is_keys=True), cache_rows(fused[2], is_keys=False)
    for ours, theirs in zip(native, run(REFERENCE, fused=True), strict=True):
        assert_near(ours, theirs, floor=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
def test_embedding_and_norms_with_a_residual(isa: str, dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    for size in (16, 33, 128):
        table, residual = random(11, size, dtype=dtype), random(5, size, dtype=dtype, seed=1)
        ids = torch.tensor([10, 0, 3, 3, 9])
        assert torch.equal(kernels.embed(table, ids, table.dtype), table[ids])
        assert torch.equal(kernels.embed(table, ids, table.dtype, residual), table[ids] + residual)
        assert torch.equal(kernels.embed(table, ids, table.dtype, scale=8.0), table[ids] * 8.0)
        x, weight, bias = table[:5], table[5], table[6]
        assert torch.equal(kernels.rms_norm(x, weight, 1e-6, residual), kernels.rms_norm(x, weight, 1e-6) + residual)
        plain = kernels.layer_norm(x, weight, bias, 1e-5)
        assert torch.equal(kernels.layer_norm(x, weight, bias, 1e-5, residual), plain + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
def test_argmax_takes_the_first_among_equals(isa: str, dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    for size in (1, 3, 17, 1000, 30001):
        x = random(4, size, dtype=dtype)
        x[1] = -5.0
        x[2] = float("-inf")
        x[3, size // 2 :] = 9.0
        expected = torch.stack([(row == row.max()).nonzero()[0, 0] for row in x])
        assert torch.equal(kernels.argmax(x), expected)
        for row in (0, 3):  # not the largest anywhere, and not in the way of it
            x[row, expected[row] + 1 :: 3] = float("nan")
            x[row, : expected[row]] = float("nan")
        x[2, : size // 2] = x[1] = float("nan")
        expected[1] = 0
        for backend in (kernels, REFERENCE):
            assert torch.equal(backend.argmax(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["x32", "x16"])
@pytest.mark.parametrize("size", [4, 36, 64, 100])
def test_int8_cache_writes_give_the_reference_s_bytes(isa: str, dtype: torch.dtype, size: int) -> None:
    kernels = native_kernels(isa)
    merged = 5 * random(6, 9, size, dtype=dtype)
    merged[2] = 0.0
    merged[3, :, : size // 2] *= 1e-20
    slots = torch.tensor([7, 0, 30, 31, 2, 19])
    caches = [[torch.full((4, 8, 2, size + 4), 3, dtype=torch.int8) for _ in range(2)] for _ in range(2)]
    kernels.store_kv(merged[:, 4:6], merged[:, 7:9], *caches[0], slots)
    REFERENCE.store_kv(merged[:, 4:6], merged[:, 7:9], *caches[1], slots)
    for ours, theirs, is_keys in zip(*caches, (True, False), strict=True):
        values, scales = int8_kv_views(theirs)
        assert torch.equal(cache_rows(ours, is_keys=is_keys), values)
        assert torch.equal(int8_kv_views(ours)[1], scales)
    for number in (float("nan"), float("inf")):
        key = merged[:, 4:6].clone()
        key[1, 1, size - 1] = number
        for kernels_of_either, (keys, spare) in ((kernels, caches[0]), (REFERENCE, caches[1])):
            kernels_of_either.store_kv(key, merged[:, 7:9], keys, spare, slots)
            scales = int8_kv_views(keys)[1].flatten(0, 1)[slots]
            assert torch.equal(scales.isfinite(), torch.arange(12).view(6, 2) != 3)
            kernels_of_either.store_kv(merged[:, 4:6], merged[:, 7:9], keys, spare, slots)
    values, scales = int8_kv_views(caches[1][0])
    stored = (values.float() * scales.unsqueeze(-1)).flatten(0, 1)[slots]
    assert ((stored - merged[:, 4:6].float()).abs() <= merged[:, 4:6].float().abs().amax(-1, keepdim=True) / 253).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["x32", "x16", "x8"])
def test_blocks_are_copied_in_every_part(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randint(-128, 128, (3, 64, 4, 2, 5), generator=generator).to(dtype)
    expected = memory.clone()
    pairs = [(3, 60), (3, 61), (0, 1), (63, 2)]
    REFERENCE.copy_blocks(list(expected), pairs)
    native_kernels(isa).copy_blocks(list(memory), pairs)
    assert torch.equal(memory, expected)
    assert torch.equal(memory[:, 60], memory[:, 3]) and torch.equal(memory[:, 2], memory[:, 63])


def test_shapes_and_types_that_do_not_fit() -> None:
    kernels, x = native_kernels("plain"), torch.zeros(4, 2, 8)
    caches, slots = [torch.zeros(2, 4, 2, 8) for _ in range(2)], torch.arange(4)
    for call in (
        lambda: kernels.rms_norm(x[0], torch.ones(7), 1e-6),
        lambda: kernels.rms_norm(x[0], torch.ones(8, dtype=torch.bfloat16), 1e-6),
        lambda: kernels.rms_norm(x[0], torch.ones(8), 1e-6, x[0].bfloat16()),
        lambda: kernels.embed(x[0], slots.int(), x.dtype),
        lambda: kernels.embed(x[0], slots[:2], x.dtype, x[0].bfloat16()),
        lambda: kernels.store_kv(x, x.bfloat16(), *caches, slots),
        lambda: kernels.store_kv(x, x, *caches, slots[:3]),
        lambda: kernels.store_kv(x[:, :, :4], x[:, :, :4], *caches, slots),
        lambda: kernels.varlen_attention(x, x, x, [0, 5], [0, 4], Scores(1.0)),
        lambda: kernels.varlen_attention(x, x, x, [0, 4], [0, 2, 4], Scores(1.0)),
        lambda: kernels.paged_attention(x, *caches, Batch([], [], [], [0, 4], [4], [], []), Scores(1.0)),
    ):
        with pytest.raises(ValueError, match=r"does not fit|other numbers of sequences"):
            call()
