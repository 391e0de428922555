"""A user's own network with named inputs and outputs, served as it is: a PyTorch module, an exported program, ONNX.

`Servable` says what clients send and get, along which axis requests may be joined, and what happens before and after.
Arrays are numpy's; nothing here knows of queues or HTTP.

    import fastserve, torch

    servable = fastserve.Servable(
        torch.nn.Linear(16, 1),
        inputs={"features": ("float32", [-1, 16])},
        outputs={"score": ("float32", [-1, 1])},
    )

in `ranking.py` is served by `fastserve serve ranking.py:servable`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fastserve.core.arrays import TensorSpec
from fastserve.core.errors import CheckpointError, ConfigError

NumpyArray = np.ndarray[Any, np.dtype[Any]]
NamedArrays = dict[str, NumpyArray]
Specs = Mapping[str, TensorSpec | tuple[str, Sequence[int]]]
_ONNX_DTYPES = {"float": "float32", "double": "float64", "string": "bytes"}  # others have numpy's names


class Servable:
    """A network ready to be served.

    Args:
        network: a torch module (called with tensors by name; gives a dict, a tensor, or a tuple in the order of
            `outputs`) or any function from a dict of numpy arrays to one.
        inputs, outputs: name -> numpy's name of the type (or "bytes") and shape, -1 for any size.
        batch_axis: the axis along which requests are joined and answers split; None: one request at a time.
        preprocess: from what clients send, joined, to what the network takes; both by name.
        postprocess: from what the network gives to what clients get.
        max_batch_size: most entries along the batch axis in one call.

    Raises:
        ConfigError: no inputs or outputs, or a shape without the batch axis.
    """

    def __init__(
        self,
        network: torch.nn.Module | Callable[[NamedArrays], NamedArrays],
        inputs: Specs,
        outputs: Specs,
        *,
        batch_axis: int | None = 0,
        preprocess: Callable[[NamedArrays], NamedArrays] | None = None,
        postprocess: Callable[[NamedArrays], NamedArrays] | None = None,
        max_batch_size: int = 256,
    ) -> None:
        self.inputs, self.outputs = _as_specs(inputs), _as_specs(outputs)
        self.batch_axis = batch_axis
        self.max_batch_size = max_batch_size
        self._network: Callable[[NamedArrays], Any] = (
            _TorchCall(network) if isinstance(network, torch.nn.Module) else network
        )
        self._preprocess = preprocess
        self._postprocess = postprocess
        for name, spec in {**self.inputs, **self.outputs}.items():
            if batch_axis is not None and (len(spec.shape) <= batch_axis or spec.shape[batch_axis] != -1):
                raise ConfigError(
                    f"{name} has shape {spec.shape}, whose axis {batch_axis} must be -1 because requests are joined "
                    "along it; or say batch_axis=None"
                )

    def __call__(self, arrays: NamedArrays) -> NamedArrays:
        """Compute a batch.

        Raises:
            CheckpointError: the network gives other outputs than it was said to.
        """
        given = arrays if self._preprocess is None else self._preprocess(arrays)
        results = self._network(given)
        if self._postprocess is not None:
            results = self._postprocess(_named(results, list(self.outputs)))
        named = _named(results, list(self.outputs))
        for name, spec in self.outputs.items():
            if name not in named:
                raise CheckpointError(f"the network gave no output {name!r}; it gave {', '.join(named)}")
            named[name] = np.ascontiguousarray(named[name], dtype=object if spec.dtype == "bytes" else spec.dtype)
        return {name: named[name] for name in self.outputs}

    @classmethod
    def from_onnx(cls, path: str | Path, num_threads: int = 0, **options: Any) -> Self:
        """An ONNX file through onnxruntime; names, types and shapes are the file's.

        Raises:
            ConfigError: onnxruntime is not installed.
            CheckpointError: the file cannot be read.
        """
        try:
            import onnxruntime as runtime
        except ImportError as error:
            raise ConfigError("ONNX files need onnxruntime: pip install 'fastserve[export]'") from error
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = num_threads
        try:
            session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many kinds
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        inputs, outputs = (
            {item.name: _onnx_spec(item) for item in items} for items in (session.get_inputs(), session.get_outputs())
        )

        def run(arrays: NamedArrays) -> NamedArrays:
            given = {
                name: np.array([item.decode() for item in array.ravel()], dtype=object).reshape(array.shape)
                if inputs[name].dtype == "bytes"
                else array
                for name, array in arrays.items()
            }
            return dict(zip(outputs, session.run(list(outputs), given), strict=True))

        return cls(run, inputs, outputs, **{"batch_axis": _common_axis(inputs, outputs), **options})

    @classmethod
    def from_program(cls, path: str | Path, **options: Any) -> Self:
        """A program that torch.export saved (.pt2); names are those of its graph.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            program = torch.export.load(str(path))
        except Exception as error:  # torch raises many kinds
            raise CheckpointError(f"{path} cannot be read as an exported program: {error}") from error
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        graph = program.graph_signature
        inputs, outputs = (
            {str(name): _torch_spec(values[str(name)]) for name in names}
            for names in (graph.user_inputs, graph.user_outputs)
        )
        module = program.module()

        def run(arrays: NamedArrays) -> Any:
            return _to_numpy(module(*(torch.from_numpy(arrays[name]) for name in inputs)))

        return cls(run, inputs, outputs, **{"batch_axis": _common_axis(inputs, outputs), **options})


class _TorchCall:
    """A module called with tensors by name."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = network.eval()

    @torch.inference_mode()
    def __call__(self, arrays: NamedArrays) -> Any:
        return _to_numpy(self._network(**{name: torch.from_numpy(array) for name, array in arrays.items()}))


def load_servable(name: str, num_threads: int = 0) -> Servable:
    """What a name stands for (see `is_servable` of checkpoint/folder.py). Code that is named is run.

    Raises:
        CheckpointError: there is no such file, module or object.
    """
    if name.endswith((".onnx", ".pt2")) and not Path(name).is_file():
        raise CheckpointError(f"there is no file {name}")
    if name.endswith(".onnx"):
        return Servable.from_onnx(name, num_threads)
    if name.endswith(".pt2"):
        return Servable.from_program(name)
    module_name, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise CheckpointError(f"{module_name} cannot be imported: {error}") from error
    found = getattr(module, attribute, None)
    if callable(found) and not isinstance(found, Servable):
        found = found()
    if not isinstance(found, Servable):
        raise CheckpointError(f"{module_name} has no fastserve.Servable called {attribute}")
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError("there is no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _as_specs(specs: Specs) -> dict[str, TensorSpec]:
    if not specs:
        raise ConfigError("a Servable needs at least one input and one output")
    made = {}
    for name, spec in specs.items():
        spec = spec if isinstance(spec, TensorSpec) else TensorSpec(spec[0], [int(size) for size in spec[1]])
        if spec.dtype != "bytes":
            try:
                np.dtype(spec.dtype)
            except TypeError as error:
                raise ConfigError(f"{name} has type {spec.dtype!r}; give numpy's name of one, or bytes") from error
        made[name] = spec
    return made


def _named(results: Any, names: list[str]) -> NamedArrays:
    results = _to_numpy(results)
    if isinstance(results, Mapping):
        return dict(results)
    values = results if isinstance(results, list | tuple) else [results]
    return dict(zip(names, values, strict=False))


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        return {name: _to_numpy(item) for name, item in value.items()}
    return [_to_numpy(item) for item in value] if isinstance(value, list | tuple) else value


def _onnx_spec(item: Any) -> TensorSpec:
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(
        _ONNX_DTYPES.get(kind, kind), [size if isinstance(size, int) and size >= 0 else -1 for size in item.shape]
    )


def _torch_spec(value: Any) -> TensorSpec:
    shape = [size if isinstance(size, int) else -1 for size in value.shape]
    return TensorSpec(str(value.dtype).removeprefix("torch."), shape)


def _common_axis(inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> int | None:
    """Axis 0 when all have any size there, else None."""
    specs = [*inputs.values(), *outputs.values()]
    return 0 if all(spec.shape and spec.shape[0] == -1 for spec in specs) else None
