"""Tensors of a model folder, streamed from safetensors files by mmap straight into their final place.

Headers are checked before anything is read (bounds, gaps, overlaps, types, sizes), because files come from strangers.
Pages are given back to the system as soon as they are copied, so that loading needs little more memory than the
model itself. This reads; it does not decide which tensor goes where (see `models/loader.py`).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.core.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 8 * 1024 * 1024  # at most this much of a file is in memory besides its copy


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes start .. end of `file`."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


class WeightReader:
    """All tensors of a list of safetensors files.

    Args:
        files: the shards.
        weight_map: tensor name -> file name, from the folder's index; checked against the files when given.

    Raises:
        CheckpointError: a damaged or truncated file, a tensor that the index names and no file has, or a tensor that
            two files have.
    """

    def __init__(self, files: list[Path], weight_map: dict[str, str] | None = None) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        weight_map = weight_map or {}
        for file in files:
            for name, info in read_header(file).items():
                if name in self._tensors and weight_map.get(name) is None:
                    raise CheckpointError(f"tensor {name} is in two files: {self._tensors[name].file} and {file}")
                if weight_map.get(name, file.name) == file.name:
                    self._tensors[name] = info
        for name, file_name in weight_map.items():
            if name not in self._tensors:
                raise CheckpointError(f"the index says that {file_name} has tensor {name}, but it has not")
        self._modules: dict[str, list[str]] = {}
        for name in self._tensors:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._tensors)

    def names_of(self, module: str) -> list[str]:
        """Names of the tensors of one module: "module.suffix"."""
        return self._modules.get(module, [])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def info(self, name: str) -> TensorInfo:
        """Where and what a tensor is; CheckpointError when there is none of this name."""
        if name not in self._tensors:
            raise CheckpointError(f"the model folder has no tensor {name}")
        return self._tensors[name]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.start for info in self._tensors.values())

    def view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as it lies in the file, of its own type, nothing copied: to be read only, and until `release`.

        Raises:
            CheckpointError: no such tensor, or another shape.
        """
        info = self._info_of_shape(name, shape)
        return (
            self._view(info, info.start, info.end).view(shape)
            if info.start < info.end
            else torch.empty(shape, dtype=info.dtype)
        )

    def release(self, name: str) -> None:
        """Give back the memory in which the tensor's file was read; a view of it would read it again."""
        info = self.info(name)
        if info.file in self._maps and info.start < info.end:
            self._give_back(info.file, info.start, info.end)

    def prefetch(self, name: str) -> None:
        """Let the system start to read a tensor that is needed soon; does not wait."""
        info = self._tensors.get(name)
        if info is not None and info.start < info.end and hasattr(mmap, "MADV_WILLNEED"):
            start = info.start - info.start % mmap.PAGESIZE
            self._map(info.file).madvise(mmap.MADV_WILLNEED, start, info.end - start)

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor into `target`, a view of its final place: any strides, device and dtype, the same shape.

        Raises:
            CheckpointError: no such tensor, or another shape.
        """
        info = self._info_of_shape(name, tuple(target.shape))
        if info.start == info.end:
            return
        if not info.shape:
            target.copy_(self._view(info, info.start, info.end).reshape(()))
            self._give_back(info.file, info.start, info.end)
            return
        num_rows = info.shape[0]
        row_bytes = (info.end - info.start) // num_rows
        step = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            start, end = info.start + first * row_bytes, info.start + last * row_bytes
            target[first:last].copy_(self._view(info, start, end).view(last - first, *info.shape[1:]))
            self._give_back(info.file, start, end)

    def close(self) -> None:
        """Unmap the files, each when its last view is gone. Reading again maps them anew."""
        self._maps.clear()

    def _info_of_shape(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.info(name)
        if shape != info.shape:
            raise CheckpointError(
                f"tensor {name} in {info.file} has shape {list(info.shape)}, but the config asks for "
                f"{list(shape)}; the config.json and the weights do not belong together"
            )
        return info

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # Private and writable only because torch warns about read-only memory; nothing writes to it.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _view(self, info: TensorInfo, start: int, end: int) -> Tensor:
        mapped = self._map(info.file)
        if start % info.dtype.itemsize:
            return torch.frombuffer(bytearray(mapped[start:end]), dtype=info.dtype)
        count = (end - start) // info.dtype.itemsize
        return torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=start)

    def _give_back(self, file: Path, start: int, end: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            start -= start % mmap.PAGESIZE
            self._maps[file].madvise(mmap.MADV_DONTNEED, start, end - start)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file: name -> where its bytes are.

    Raises:
        CheckpointError: the file is unreadable, damaged or truncated; the message names file and tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, f"its header claims {length} bytes, the file has {size}")
            header = json.loads(handle.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    offset = 8 + length
    tensors = {name: _read_entry(file, name, entry, offset) for name, entry in header.items()}
    _check_layout(file, tensors, offset, size)
    return tensors


def _read_entry(file: Path, name: str, entry: Any, offset: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, f"tensor {name} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str):
        raise _damaged(file, f"tensor {name} has a type that is no text")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has type {dtype!r}, which is not supported")
    if not isinstance(shape, list) or not all(type(item) is int and item >= 0 for item in (*shape, start, end)):
        raise _damaged(file, f"tensor {name} has a shape or offsets that are no whole numbers")
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _damaged(file, f"tensor {name} of shape {shape} and type {dtype} does not fill bytes {start} to {end}")
    return TensorInfo(file, tuple(shape), _DTYPES[dtype], offset + start, offset + end)


def _check_layout(file: Path, tensors: dict[str, TensorInfo], offset: int, size: int) -> None:
    """Tensors must follow one another without gap or overlap and fill the file, as the format demands."""
    position = offset
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > size:
            raise _damaged(
                file, f"tensor {name} ends at byte {info.end}, but the file has only {size}: it is truncated"
            )
        if info.start != position:
            problem = "overlaps the one before it" if info.start < position else "leaves a gap before it"
            raise _damaged(file, f"tensor {name} {problem}")
        position = info.end
    if position != size:
        raise _damaged(file, f"{size - position} bytes at its end belong to no tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {problem}; copy or download it again")
