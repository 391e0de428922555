"""Whom a student learns from: a model in this process, one that a server runs, or what either said before, on disk.

A teacher is called with a step's number and inputs and gives logits at every place: of all tokens, or (servers and
caches) of the likeliest ones alone. T places, V vocabulary, k tokens kept.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.weights import WeightReader
from fastserve.compress.folder_writer import write_json
from fastserve.core.errors import ConfigError

_TIMEOUT_SECONDS = 300
_ABOUT = "about.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a teacher says.

    Attributes:
        logits: [T, V], or [T, k] of the tokens `token_ids` alone.
        token_ids: [T, k] int64, or None: logits of all tokens.
    """

    logits: Tensor
    token_ids: Tensor | None = None


# (number of the step, the forward's arguments, which places count [B, L]) -> what the teacher says there.
Teacher = Callable[[int, Mapping[str, Tensor], Tensor], Wanted]


def is_server(teacher: str) -> bool:
    """Whether a recipe's teacher is a server's address and not a folder."""
    return teacher.startswith(("http://", "https://"))


def in_process(model: Any) -> Teacher:
    """A transformers model."""

    def ask(_: int, inputs: Mapping[str, Tensor], counts: Tensor) -> Wanted:
        with torch.no_grad():
            return Wanted(model(**inputs).logits[counts])

    return ask


class ServerTeacher:
    """A running server with OpenAI's completions and `prompt_logprobs`, such as `fastserve serve`; decoders only.

    Args:
        url: its address, without /v1.
        top: likeliest tokens to ask for at each place.

    Raises:
        ConfigError: no server there, or one that gives no log probabilities of prompts.
    """

    def __init__(self, url: str, top: int) -> None:
        self._url = url.rstrip("/")
        self._top = top
        self._model = str(self._request("models", None)["data"][0]["id"])

    def __call__(self, number: int, inputs: Mapping[str, Tensor], counts: Tensor) -> Wanted:
        body = {"model": self._model, "prompt": inputs["input_ids"].tolist(), "max_tokens": 1, "temperature": 0}
        choices = self._request("completions", {**body, "prompt_logprobs": self._top})["choices"]
        choices.sort(key=lambda choice: int(choice["index"]))
        if any("prompt_logprobs" not in choice for choice in choices):
            raise ConfigError(f"the server at {self._url} gives no prompt_logprobs; distil from its folder instead")
        token_ids = torch.zeros(*counts.shape, self._top, dtype=torch.int64)
        logits = torch.full(token_ids.shape, -torch.inf)
        for row, choice in enumerate(choices):
            for place, entry in enumerate(choice["prompt_logprobs"][1:]):  # of the token after each place
                found = sorted(((item["logprob"], int(name)) for name, item in entry.items()), reverse=True)
                for rank, (logprob, token_id) in enumerate(found[: self._top]):
                    logits[row, place, rank], token_ids[row, place, rank] = logprob, token_id
        return Wanted(logits[counts], token_ids[counts])

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/v1/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            detail = error.read().decode(errors="replace")[:300] if hasattr(error, "read") else ""
            raise ConfigError(f"the teacher at {self._url} does not answer: {error} {detail}".rstrip()) from error


class CachedTeacher:
    """Keeps what another teacher says, its likeliest tokens; asks it only for steps that are not there yet.

    Args:
        folder: one file per step; made when it is not there.
        about: what the answers depend on; a folder that was begun with other values is refused.
        make: the other teacher, made when the first step asks for it.

    Raises:
        ConfigError: the folder holds answers to other questions.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], top: int, make: Callable[[], Teacher]) -> None:
        self._folder = folder
        self._top = top
        self._make = make
        self._teacher: Teacher | None = None
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / _ABOUT
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != dict(about):
            raise ConfigError(f"distill: cache = {str(folder)!r} holds another recipe's answers; name another folder")
        write_json(known, about)

    def __call__(self, number: int, inputs: Mapping[str, Tensor], counts: Tensor) -> Wanted:
        from safetensors.torch import save_file

        file = self._folder / f"{number:07d}.safetensors"
        if not file.is_file():
            self._teacher = self._teacher or self._make()
            found = self._teacher(number, inputs, counts)
            logits, ids = found.logits, found.token_ids
            if ids is None:
                logits, ids = logits.log_softmax(-1).topk(min(self._top, logits.shape[-1]))
            temporary = file.with_suffix(".writing")
            save_file({"logits": logits.to(torch.bfloat16), "token_ids": ids.to(torch.int32)}, temporary)
            temporary.replace(file)
        reader = WeightReader([file])  # so that the first run learns from the same numbers as the next
        tensors = {name: reader.view(name, reader.shape(name)).clone() for name in reader.names()}
        return Wanted(tensors["logits"].float(), tensors["token_ids"].long())
