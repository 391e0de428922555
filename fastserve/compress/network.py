"""transformers' modules of a folder, without their weights: filled one block at a time, so that memory stays small.

A block is one of the equal layers that a network repeats; the rest (embeddings, last norm, heads) is outside. The
tensors keep the names that they have in the folder, which differ from the modules' names by a prefix at most. Weights
of a quantised folder are read as what their values stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.quantization import QuantizedFormat, read_quantization
from fastserve.checkpoint.quantized import read_quantized
from fastserve.core.errors import CheckpointError, ConfigError

_PART = 1 << 20  # values that are looked at together


class Network:
    """The network of a folder, on the meta device.

    Attributes:
        folder, model: where the weights lie, and the modules.
        others: tensors of the folder that are no parameters; the modules' buffers among them have these values.
        blocks: names of the repeated layers, in the order in which the modules list them.
        tied: parameters that the folder does not have: they share another one's values, or are computed (positions).

    Raises:
        CheckpointError: transformers does not know the architecture, or folder and modules do not belong together.
        ConfigError: accelerate is not installed.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.model = _without_weights(folder)
        self._reader = folder.weights
        self._quantization = read_quantization(folder.config)
        self._tensor_of = self._match_names()
        self.tied = {name for name, _ in self.model.named_parameters() if name not in self._tensor_of}
        self.others = sorted(set(self._reader.names()) - set(self._tensor_of.values()))
        for name, values in self.model.named_buffers():
            if name in self.others and self._reader.shape(name) == tuple(values.shape):
                self._reader.read_into(name, values)
        self.blocks = find_blocks(self.model)
        if not self.blocks:
            raise CheckpointError(f"{folder.architecture} repeats no layers that could be compressed one by one")

    def block(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def tensor_name(self, parameter: str) -> str:
        """What the folder calls a parameter (or a module, with a parameter's name shortened)."""
        return self._tensor_of[parameter]

    def linears(self, block: str) -> dict[str, nn.Linear]:
        """Linear layers of a block: full module name -> module."""
        found = self.block(block).named_modules(prefix=block)
        return {name: module for name, module in found if isinstance(module, nn.Linear)}

    def parameters_of(self, block: str) -> list[str]:
        """Parameters of a block by full name; those outside of all blocks for ""."""
        names = [name for name, _ in self.model.named_parameters()]
        if block:
            return [name for name in names if name.startswith(f"{block}.")]
        inside = tuple(f"{name}." for name in self.blocks)
        return [name for name in names if not name.startswith(inside) and name in self._tensor_of]

    def read(self, parameter: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """A parameter's values from the folder, as `dtype` or (None) as they lie there."""
        name = self._tensor_of[parameter]
        if self._format(name) is not None:
            return self._dequantized(name, tuple(self.model.get_parameter(parameter).shape), dtype)
        target = torch.empty(self._reader.shape(name), dtype=dtype or self._reader.dtype(name))
        self._reader.read_into(name, target)
        return target

    def read_other(self, name: str) -> Tensor:
        """A tensor of `others`, as it lies in the folder."""
        target = torch.empty(self._reader.shape(name), dtype=self._reader.dtype(name))
        self._reader.read_into(name, target)
        return target

    def is_compressed(self, parameter: str) -> bool:
        """Whether the folder holds something else than the parameter's values, of which `read` makes them."""
        return self._format(self._tensor_of[parameter]) is not None

    def dtype_of(self, parameter: str) -> torch.dtype:
        return self._reader.dtype(self._tensor_of[parameter])

    def fill(self, block: str) -> None:
        """Give the block's parameters (or those outside of all blocks, for "") their values, in float32."""
        for name in self.parameters_of(block):
            self.set(name, self.read(name))
        if not block:
            self.model.tie_weights()

    def fill_for_blocks(self) -> None:
        """Give what lies outside of all blocks its values, as far as passes that end in a block need them: an
        embedding reads the rows that are asked for from the folder, each time."""
        self.model.tie_weights()
        tables: dict[int, list[nn.Embedding]] = {}
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                tables.setdefault(id(module.weight), []).append(module)
        for name in self.parameters_of(""):
            values = self.model.get_parameter(name)
            users = tables.get(id(values), [])
            if not users or self.is_compressed(name) or any(type(module) is not nn.Embedding for module in users):
                self.set(name, self.read(name))
                continue
            self.set(name, torch.full((1, 1), torch.nan).expand(values.shape))  # of the right kind, and no memory
            for module in users:
                module.forward = self._rows(self._tensor_of[name])  # type: ignore[method-assign, assignment]
        self.model.tie_weights()

    def _rows(self, name: str) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            rows = nn.functional.embedding(ids, self._reader.view(name, self._reader.shape(name))).float()
            self._reader.release(name)
            return rows

        return forward

    def set(self, parameter: str, values: Tensor) -> None:
        module, _, own = parameter.rpartition(".")
        setattr(self.model.get_submodule(module), own, nn.Parameter(values, requires_grad=False))

    def drop(self, block: str) -> None:
        """Give the memory of the block (or, for "", of what lies outside) back."""
        for name in self.parameters_of(block):
            values = self.model.get_parameter(name)
            self.set(name, torch.empty_like(values, device="meta"))
        if not block:
            self.model.tie_weights()
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    vars(module).pop("forward", None)

    def check_finite(self) -> Iterator[str]:
        """Look for values that are no numbers, tensor by tensor; yields each name before it is read.

        Raises:
            CheckpointError: there are some; the message names the tensor.
        """
        for name in self._reader.names():
            yield name
            values = self._reader.view(name, self._reader.shape(name)).flatten()
            if values.is_floating_point() and not all(bool(part.isfinite().all()) for part in values.split(_PART)):
                raise CheckpointError(
                    f"{name} holds values that are not finite (NaN or infinity); the folder {self.folder.path} is "
                    "damaged or its training diverged: copy it again, or go back to an earlier checkpoint"
                )
            self._reader.release(name)

    def _format(self, name: str) -> QuantizedFormat | None:
        """How a weight is quantised; None when it was left as it was."""
        module, _, suffix = name.rpartition(".")
        if self._quantization is None or suffix != "weight":
            return None
        for class_name in ("Linear", "Embedding"):
            layout = self._quantization.format_of(module, class_name)
            if layout is not None and f"{module}.{layout.marker}" in self._reader:
                return layout
        return None

    def _dequantized(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        layout = self._format(name)
        assert layout is not None and len(shape) == 2
        weight = read_quantized(self._reader, name.removesuffix(".weight"), shape, layout)
        dense = weight if isinstance(weight, Tensor) else weight.dequantize()
        return dense.to(dtype or dense.dtype)

    def _match_names(self) -> dict[str, str]:
        prefix = f"{self.model.base_model_prefix}."
        tied = set(self.model.all_tied_weights_keys)
        found, missing = {}, []
        for name, values in list(self.model.named_parameters()):
            options = (name, name.removeprefix(prefix), prefix + name)
            match = next((item for item in options if item in self._reader or self._format(item)), None)
            if match is None:
                module = self.model.get_submodule(name.rpartition(".")[0])
                if hasattr(module, "create_weight"):  # sinusoids, which few folders have
                    self.set(name, module.create_weight())
                elif name not in tied:
                    missing.append(name)
            elif match in self._reader and self._reader.shape(match) != tuple(values.shape):
                raise CheckpointError(
                    f"tensor {match} has shape {list(self._reader.shape(match))}, but the config asks for "
                    f"{list(values.shape)}; the config.json and the weights do not belong together"
                )
            else:
                found[name] = match
        if missing:
            raise CheckpointError(
                f"{self.folder.path} has no tensor for {missing[0]} of {self.folder.architecture}; folders whose "
                "tensors are arranged otherwise than transformers' modules (experts, for one) cannot be compressed"
            )
        return found


def layer_lists(config: Any, kept: Sequence[int]) -> dict[str, list[Any]]:
    """What transformers' config lists layer by layer (not every config.json does), for these layers alone."""
    found = ((key, getattr(config, key, None)) for key in ("layer_types", "no_rope_layers"))
    lists = {key: item for key, item in found if isinstance(item, list) and len(item) > max(kept)}
    return {key: [item[at] for at in kept] for key, item in lists.items()}


def load_dense(folder: ModelFolder) -> Any:
    """transformers' model of a folder in float32, quantised weights as what their values stand for, in eval mode."""
    network = Network(folder)
    for name in ("", *network.blocks):
        network.fill(name)
    return network.model


def _without_weights(folder: ModelFolder) -> Any:
    import transformers

    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ConfigError("compressing needs accelerate; install it with: pip install 'fastserve[compress]'") from error
    network = getattr(transformers, folder.architecture, None)
    if network is None:
        raise CheckpointError(
            f"transformers has no {folder.architecture or 'architecture (config.json names none)'}; only its own "
            "architectures can be compressed"
        )
    config = transformers.AutoConfig.from_pretrained(folder.path)
    with init_empty_weights(include_buffers=False):
        model = network(config)
    for module in model.modules():  # a cache would remember what a block was given when it is run again
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model.eval()


def find_blocks(model: nn.Module) -> list[str]:
    """Children of the outermost module lists whose members are all of one class."""
    names: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{block}.") for block in names)
        if not is_inside and isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            names += [f"{name}.{index}" for index in range(len(module))]
    return names


def unsupported(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """The first module with a matrix that no method here knows (such as GPT-2's Conv1D), or ""."""
    known = (nn.Linear, nn.Embedding)
    for name, module in modules:
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(module, known) and any(values.dim() > 1 for values in own.values()):
            return f"{name} ({type(module).__name__})"
    return ""
