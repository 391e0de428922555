"""An engine process without a model: the real process loop and frames, with a few lines in place of the network.

It answers with its prompt, over and over, one token per request and step, and obeys orders given as prompt token ids.
Run as `python fake_engine.py FD`. `FAKE_ENGINE_LOAD` and `FAKE_ENGINE_STEP` set the seconds of loading and of a step,
`FAKE_ENGINE_FAILS` names a file whose existence makes the start fail.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout, when this runs as a program

from fastserve.core.config import EngineConfig
from fastserve.core.errors import CheckpointError, RequestError
from fastserve.core.request import FINISH_LENGTH, Request, TokenLogprobs, TokenOutput
from fastserve.engine.messages import EngineStats
from fastserve.engine.process import main

VOCAB_SIZE = 320
MAX_MODEL_LEN = 256
# Orders: what the engine does with a prompt that begins with this id.
CRASH, RAISE, REFUSE, HANG, WAIT = 300, 301, 302, 303, 304
COMMAND = [sys.executable, str(Path(__file__).resolve())]


class FakeEngine:
    """Echoes prompts; see the module docstring."""

    def __init__(self, config: EngineConfig) -> None:
        fails = os.environ.get("FAKE_ENGINE_FAILS")
        if config.model == "broken" or (fails and Path(fails).exists()):
            raise CheckpointError("model.safetensors is damaged: download it again")
        time.sleep(float(os.environ.get("FAKE_ENGINE_LOAD", "0")))
        self.max_model_len = MAX_MODEL_LEN
        self.vocab_size = VOCAB_SIZE
        self.report = "fake memory plan"
        self._max_batch = config.max_batch_sequences
        self._step_seconds = float(os.environ.get("FAKE_ENGINE_STEP", "0.001"))
        self._requests: dict[str, tuple[Request, int]] = {}
        self._stats = EngineStats(kv_blocks_total=10)

    def add(self, request: Request) -> None:
        if request.prompt_ids[0] == REFUSE:
            raise RequestError("this one is refused")
        self._requests[request.request_id] = (request, 0)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def tend(self) -> None:
        pass

    def load_adapter(self, name: str, path: str) -> None:
        if not Path(path).is_dir():
            raise RequestError(f"{path} is no adapter folder", "lora_path")

    def unload_adapter(self, name: str) -> None:
        if any(request.adapter == name for request, _ in self._requests.values()):
            raise RequestError(f"adapter {name!r} is in use", "lora_name")

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[TokenOutput]:
        time.sleep(self._step_seconds)
        outputs = []
        for request_id, (request, made) in list(self._requests.items())[: self._max_batch]:
            order = request.prompt_ids[0]
            if order == CRASH and made == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if order == RAISE and made == 1:
                raise RuntimeError("the step went wrong")
            if order == HANG and made == 1:
                time.sleep(3600)
            if order == WAIT:
                continue
            outputs.append(self._next(request, made))
            if outputs[-1].finish_reason:
                del self._requests[request_id]
            else:
                self._requests[request_id] = (request, made + 1)
        self._stats.generation_tokens += len(outputs)
        return outputs

    def _next(self, request: Request, made: int) -> TokenOutput:
        prompt, sampling = request.prompt_ids, request.sampling
        token_id = prompt[made % len(prompt)]
        output = TokenOutput(request.request_id, [token_id])
        if sampling.logprobs is not None:
            output.logprobs = [_logprobs(token_id, sampling.logprobs)]
        if made == 0:
            output.scheduled_time = time.monotonic()
            if sampling.prompt_logprobs is not None:
                rest = [_logprobs(token_id, sampling.prompt_logprobs) for token_id in prompt[1:]]
                output.prompt_logprobs = [None, *rest]
        if made + 1 == sampling.max_tokens:
            output.finish_reason = FINISH_LENGTH
        return output

    def stats(self) -> EngineStats:
        self._stats.num_running = min(len(self._requests), self._max_batch)
        self._stats.num_waiting = len(self._requests) - self._stats.num_running
        return self._stats


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    """The token itself as the most probable one, then its followers, each half as probable."""
    others = [(token_id + rank) % VOCAB_SIZE for rank in range(count)]
    return TokenLogprobs([token_id, *others], [-0.5, *(-0.5 - 0.7 * rank for rank in range(count))], 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), FakeEngine))
