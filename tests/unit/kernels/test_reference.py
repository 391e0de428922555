"""The reference kernels: rows that do not depend on the others, and attention against a plain definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastserve.kernels.interface import Batch, Scores
from fastserve.kernels.reference import Kernels, padded_rows

KERNELS = Kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_linear_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = KERNELS.pack_linear((torch.randn(96, 64) * 0.1).to(dtype), torch.randn(96).to(dtype))
    x = torch.randn(300, 64).to(dtype)
    whole = KERNELS.linear(packed, x)
    for num_rows in (*range(1, 70), 127, 128, 129, 255, 257):
        assert torch.equal(KERNELS.linear(packed, x[:num_rows]), whole[:num_rows]), num_rows


def test_few_row_counts_are_ever_computed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        counts = [padded_rows(num_rows, dtype) for num_rows in range(1, 1025)]
        assert all(count >= num_rows for num_rows, count in enumerate(counts, start=1))
        assert len(set(counts)) <= 32
        assert counts == sorted(counts)
    assert all(padded_rows(num_rows, torch.float32) % 4 == 0 for num_rows in range(1, 1025))


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """The definition, one query and head at a time, in float64."""
    num_queries, num_heads, _ = query.shape
    num_keys, group = key.shape[0], num_heads // key.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for index in range(num_queries):
        position = num_keys - num_queries + index
        first = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            scores = (key[first : position + 1, head // group].double() @ query[index, head].double()) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            output[index, head] = scores.softmax(0) @ value[first : position + 1, head // group].double()
    return output


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 6, 17])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_paged_attention_equals_its_definition(num_heads: int, num_kv_heads: int, window: int, softcap: float) -> None:
    torch.manual_seed(1)
    block_size, size = 4, 8
    lengths = [(1, 1), (1, 23), (9, 9), (5, 18), (30, 33)]  # queries, context
    keys = torch.randn(64, block_size, num_kv_heads, size)
    values = torch.randn(64, block_size, num_kv_heads, size)
    free = torch.randperm(64)
    tables, starts = [], [0]
    for num_queries, context in lengths:
        count = -(-context // block_size)
        tables.append(free[:count])
        free = free[count:]
        starts.append(starts[-1] + num_queries)
    lists = [table.tolist() for table in tables]
    batch = Batch([], [], [], starts, [context for _, context in lengths], lists, [])
    query = torch.randn(starts[-1], num_heads, size)
    output = KERNELS.paged_attention(query, keys, values, batch, Scores(0.3, window, softcap))
    for index, (_, context) in enumerate(lengths):
        key = keys[tables[index]].flatten(0, 1)[:context]
        value = values[tables[index]].flatten(0, 1)[:context]
        part = slice(starts[index], starts[index + 1])
        expected = attend_plainly(query[part], key, value, 0.3, window, softcap)
        assert torch.allclose(output[part].double(), expected, atol=1e-5)


def test_store() -> None:
    keys, values = torch.zeros(4, 2, 1, 3), torch.zeros(4, 2, 1, 3)
    key = torch.arange(9.0).view(3, 1, 3)
    KERNELS.store_kv(key, -key, keys, values, torch.tensor([5, 0, 3]))
    assert torch.equal(keys.view(8, 3)[[5, 0, 3]], key[:, 0])
    assert torch.equal(values.view(8, 3)[[5, 0, 3]], -key[:, 0])


def test_rope_rotates_pairs_by_their_angle() -> None:
    torch.manual_seed(2)
    x, angle = torch.randn(5, 2, 10), torch.rand(5, 4)
    rotated = KERNELS.apply_rope(x, angle.cos(), angle.sin())
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones(5, 1, 4), angle[:, None])
    assert torch.allclose(rotated[..., :4], turned.real, atol=1e-6)
    assert torch.allclose(rotated[..., 4:8], turned.imag, atol=1e-6)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
