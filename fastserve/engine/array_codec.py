"""Arrays of requests and answers (`core/arrays.py`) as numpy's, and back. Both ends of the process boundary use it."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from fastserve.core.arrays import Array
from fastserve.core.errors import RequestError

NumpyArray = np.ndarray[Any, np.dtype[Any]]
_LENGTH = struct.Struct("<I")


def to_numpy(array: Array) -> NumpyArray:
    """The array, read-only; elements of "bytes" become Python's, in an array of objects.

    Raises:
        RequestError: as many bytes as the shape does not ask for.
    """
    if array.dtype == "bytes":
        elements = split_bytes(array.data)
        if len(elements) != _count(array.shape):
            raise RequestError(f"shape {array.shape} asks for {_count(array.shape)} elements, not {len(elements)}")
        made = np.empty(len(elements), dtype=object)
        made[:] = elements
        return made.reshape(array.shape)
    dtype = np.dtype(array.dtype)
    if len(array.data) != _count(array.shape) * dtype.itemsize:
        raise RequestError(
            f"shape {array.shape} of {array.dtype} asks for {_count(array.shape) * dtype.itemsize} bytes, not "
            f"{len(array.data)}"
        )
    return np.frombuffer(array.data, dtype=dtype).reshape(array.shape)


def from_numpy(values: NumpyArray) -> Array:
    """numpy's array as bytes; objects must be bytes or text."""
    if values.dtype == object or values.dtype.kind in "SU":
        return Array("bytes", list(values.shape), join_bytes(values.ravel().tolist()))
    return Array(str(values.dtype), list(values.shape), np.ascontiguousarray(values).tobytes())


def join_bytes(elements: list[Any]) -> bytes:
    """Byte strings (text in UTF-8), each behind its length."""
    parts = [item.encode() if isinstance(item, str) else bytes(item) for item in elements]
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def split_bytes(data: bytes) -> list[bytes]:
    """What `join_bytes` joined.

    Raises:
        RequestError: a length that leads beyond the end.
    """
    elements, start = [], 0
    while start < len(data):
        end = start + _LENGTH.size
        if end > len(data) or end + _LENGTH.unpack_from(data, start)[0] > len(data):
            raise RequestError("the elements of a BYTES tensor end too early; each is a length of four bytes and data")
        end += _LENGTH.unpack_from(data, start)[0]
        elements.append(data[start + _LENGTH.size : end])
        start = end
    return elements


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
