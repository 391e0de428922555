"""Write a model folder one shard at a time, so that work that was interrupted goes on where it stopped.

Shards lie in a work folder beside the target, each written to a temporary name and then moved: a shard that is there is
whole. `finish` adds the small files and moves the folder into its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastserve.checkpoint.folder import INDEX_FILE, ModelFolder, read_json
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import ConfigError

CARD_FILE = "fastserve.json"
_FINGERPRINT = "begun.json"
_MARK = "fingerprint"  # of the card
_NOT_COPIED = (CARD_FILE, "config.json", INDEX_FILE, "README.md", _FINGERPRINT)


class FolderWriter:
    """A folder in the making.

    Args:
        target: where it goes; must not exist, or be empty.
        source: the folder whose small files it takes over.
        recipe: what is being done, as plain values; work that was begun with another recipe is not gone on with.

    Raises:
        ConfigError: `target` holds something, or there is work that was begun with another recipe.
    """

    def __init__(self, target: Path, source: ModelFolder, recipe: Mapping[str, Any]) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is not empty; give --out another name or remove it")
        self.target = target
        self.work = target.with_name(f"{target.name}.partial")
        self._source = source
        self._mark = fingerprint(source, recipe)
        self._begin()

    def has(self, shard: str) -> bool:
        """Whether this shard was written already."""
        return self._file(shard).is_file()

    def write(self, shard: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
        """Write one shard; its name decides its place in the order of files. `notes` are for `notes`."""
        from safetensors.torch import save_file

        write_json(self._file(shard).with_suffix(".json"), notes or {})
        temporary = self.work / f"{shard}.writing"
        save_file({name: item.contiguous() for name, item in tensors.items()}, temporary, metadata={"format": "pt"})
        os.replace(temporary, self._file(shard))

    def notes(self, shard: str) -> dict[str, Any]:
        """What was noted when the shard was written; not part of the folder."""
        return read_json(self._file(shard).with_suffix(".json"))

    def remember(self, file: str, values: Mapping[str, Any]) -> None:
        """Keep what was found out until the folder is finished, for a run that goes on with it."""
        write_json(self.work / f"kept-{file}", values)

    def recall(self, file: str) -> dict[str, Any] | None:
        """What was kept under this name, or None."""
        kept = self.work / f"kept-{file}"
        return read_json(kept) if kept.is_file() else None

    def shard(self, shard: str) -> WeightReader:
        """A shard that was written."""
        return WeightReader([self._file(shard)])

    def finish(
        self, config: Mapping[str, Any], card: Mapping[str, Any], changed: Mapping[str, str | None] | None = None
    ) -> ModelFolder:
        """Number the shards, write config.json, index and card, copy the rest, and move the folder to its place.

        changed: contents of other small files that are not copied, by name; None leaves one out.
        """
        changed = changed or {}
        shards = sorted(self.work.glob("shard-*.safetensors"))
        weight_map: dict[str, str] = {}
        total = 0
        for number, file in enumerate(shards, 1):
            file.with_suffix(".json").unlink()
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            reader = WeightReader([file])
            weight_map.update(dict.fromkeys(reader.names(), name))
            total += reader.num_bytes
            os.replace(file, self.work / name)
        write_json(self.work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(self.work / "config.json", config)
        write_json(self.work / CARD_FILE, {**card, _MARK: self._mark})
        for other in sorted(self._source.path.iterdir()):
            if (
                other.is_file()
                and other.suffix not in (".safetensors", ".bin", ".pt")
                and other.name not in (*_NOT_COPIED, *changed)
            ):
                shutil.copyfile(other, self.work / other.name)
        for name, text in changed.items():
            if text is not None:
                (self.work / name).write_text(text, encoding="utf-8")
        for file in (self.work / _FINGERPRINT, *self.work.glob("kept-*")):
            file.unlink()
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.work, self.target)
        return ModelFolder.open(str(self.target))

    def _file(self, shard: str) -> Path:
        return self.work / f"shard-{shard}.safetensors"

    def _begin(self) -> None:
        file = self.work / _FINGERPRINT
        if self.work.exists() and any(self.work.iterdir()):
            if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("recipe") != self._mark:
                raise ConfigError(
                    f"{self.work} holds work that was begun with another recipe or model; remove it, or name "
                    "another --out"
                )
            return
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(file, {"recipe": self._mark})


def is_made(target: Path, source: ModelFolder, recipe: Mapping[str, Any]) -> bool:
    """Whether a `FolderWriter` with the same arguments has finished `target`."""
    card = target / CARD_FILE
    return card.is_file() and read_json(card).get(_MARK) == fingerprint(source, recipe)


def fingerprint(source: ModelFolder, recipe: Mapping[str, Any]) -> str:
    """Tells recipes and sources apart: the recipe's values, the config, and name, size and time of every shard."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.shards]
    text = json.dumps([recipe, source.config, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """As people read it; moved into place when it is whole."""
    temporary = file.with_name(f"{file.name}.writing")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
