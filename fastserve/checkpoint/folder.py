"""A model folder in the Hugging Face layout: where it is and what its JSON files say.

The folder is the only thing that passes between stages. This module finds it (built-in, local path or hub id) and
reads the small files; tensors are `weights.py`, text is `tokenizer.py`. It imports no torch.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastserve.checkpoint.gguf import find_gguf, open_converted
from fastserve.core.errors import CheckpointError

if TYPE_CHECKING:
    from fastserve.checkpoint.weights import WeightReader

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BUILTIN_NAME = "fastserve-builtin"
INDEX_FILE = "model.safetensors.index.json"
_MAX_JSON_BYTES = 256 * 1024 * 1024
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
_HUB_SKIPPED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "metal/*"]

# Networks that score or embed whole texts: the end of the class's name -> what they are for, as transformers calls it.
ENCODER_TASKS = {
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "feature-extraction",
    "Model": "feature-extraction",
}
_GENERATING = ("LMHeadModel", "MTModel", "DoubleHeadsModel")
TEXT_GENERATION = "text-generation"
TEXT_TO_TEXT = "text2text-generation"  # encoder-decoders
_SERVABLE = re.compile(r".+\.(onnx|pt2)|[^:]+:\w+")


def is_servable(name: str) -> bool:
    """Whether a model's name is a user's own network: FILE.onnx, FILE.pt2, FILE.py:object or package.module:object."""
    return _SERVABLE.fullmatch(name) is not None


class ModelFolder:
    """One model folder; use `ModelFolder.open`.

    Attributes:
        path: the folder.
        name: the folder's own name (a hub id's last part); the card's name for the built-in model.
        config, generation_config: contents of the JSON files; generation_config is {} when absent.
        shards: the safetensors files, in order.
        weight_map: tensor name -> file name from the index; {} where there is none or a single file.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_dir():
            raise CheckpointError(f"there is no model folder {path}; give the path of a folder that has a config.json")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has no config.json, so it is no model folder; give a folder in the Hugging Face layout "
                "(config.json, *.safetensors, tokenizer.json)"
            )
        self.path = path
        self.name = name
        self.config = read_json(path / "config.json")
        self.generation_config = (
            read_json(path / "generation_config.json") if self.has("generation_config.json") else {}
        )
        self.weight_map, self.shards = self._find_shards()

    @classmethod
    def open(cls, name: str = "") -> Self:
        """Open the built-in folder (""), a local path, or a hub id (downloaded, or taken from the local cache).

        A GGUF file, or a folder that holds one, is converted once; see `gguf.py`.

        Raises:
            CheckpointError: no such folder, damaged JSON, no safetensors, a shard is missing, or no network.
        """
        if not name:
            return cls._open_builtin()
        path = Path(name).expanduser()
        if file := find_gguf(path):
            return cls(open_converted(file), file.stem)
        if path.is_dir() or _HUB_ID.fullmatch(name) is None:
            return cls(path, path.resolve().name)
        return cls(_download(name), name.rsplit("/", 1)[-1])

    @classmethod
    def _open_builtin(cls) -> Self:
        if not (BUILTIN_FOLDER / "config.json").is_file():
            raise CheckpointError("this installation has no built-in model; name a model folder or a hub id")
        card = BUILTIN_FOLDER / "fastserve.json"
        name = read_json(card).get("name") if card.is_file() else None
        return cls(BUILTIN_FOLDER, str(name or BUILTIN_NAME))

    def has(self, file: str) -> bool:
        """Whether the folder has this file."""
        return (self.path / file).is_file()

    @cached_property
    def weights(self) -> WeightReader:
        """The tensors; headers are read and checked on first use."""
        from fastserve.checkpoint.weights import WeightReader

        return WeightReader(self.shards, self.weight_map)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return self.weights.num_bytes

    @property
    def architecture(self) -> str:
        """The network's class name in transformers, such as LlamaForCausalLM; "" when the config names none."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def task(self) -> str:
        """What the network is for: one of ENCODER_TASKS' values, else text-generation or text2text-generation."""
        name = self.architecture
        if self.config.get("is_encoder_decoder") and name.endswith(("ForConditionalGeneration", "MTModel")):
            return TEXT_TO_TEXT
        found = (task for suffix, task in ENCODER_TASKS.items() if name.endswith(suffix))
        return TEXT_GENERATION if name.endswith(_GENERATING) else next(found, TEXT_GENERATION)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: generation_config's, else the config's; empty when neither names one."""
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            if isinstance(value, int):
                return (value,)
            if isinstance(value, list) and value:
                return tuple(int(item) for item in value)
        return ()

    def _find_shards(self) -> tuple[dict[str, str], list[Path]]:
        single = self.path / "model.safetensors"
        if self.has(INDEX_FILE) and not single.is_file():  # beside a single file it is left from before
            return self._read_index()
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        files = [file for file in files if not file.name.startswith(("adapter_", "consolidated"))]
        if files:
            return {}, files
        if self.has("adapter_config.json"):
            raise CheckpointError(
                f"{self.path} holds an adapter, not a model; serve its base model with the option lora name={self.path}"
            )
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")) or any(self.path.glob("*.pth")):
            raise CheckpointError(
                f"{self.path} has only pickled weights (.bin or .pt), which can run code when opened and are not read; "
                "convert once with transformers: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
            )
        raise CheckpointError(f"{self.path} has no *.safetensors file; is the copy or download complete?")

    def _read_index(self) -> tuple[dict[str, str], list[Path]]:
        weight_map = read_json(self.path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / INDEX_FILE} has no weight_map; the file is damaged")
        shards = []
        for file in sorted({str(file) for file in weight_map.values()}):
            if Path(file).name != file:
                raise CheckpointError(f"{self.path / INDEX_FILE} names {file!r}, which is no plain file name")
            if not self.has(file):
                raise CheckpointError(
                    f"{self.path} lacks {file}, which {INDEX_FILE} names; copy or download that file again"
                )
            shards.append(self.path / file)
        return weight_map, shards


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file} is larger than {_MAX_JSON_BYTES} bytes and is not read")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub: accept its licence there, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name!r} here and no such model on the hub; check the name"
        ) from error
    except Exception as error:  # the hub client raises errors of several HTTP libraries when it is offline
        raise CheckpointError(
            f"there is no folder {name!r} here, and the hub cannot be reached or the model is not in the local cache "
            f"({type(error).__name__}). Offline, copy the model's folder to this machine and give its path, "
            "such as ./my-model"
        ) from error
