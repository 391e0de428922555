"""llama.cpp: llama-bench for one request, llama-server for many.

llama-bench leaves out sampling and HTTP, so that the single-request figures are the best that the engine can show; it
loads the model for each run, which is not timed. The server has a slot for each request and starts when first asked.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from worker import Engine, Ids, serve

NUM_SLOTS, SLOT_TOKENS = 32, 640  # what the longest of the many requests needs
FORMATS = {"bf16": ("BF16", "BF16"), "int8": ("Q8_0", "Q8_0"), "int4": ("Q4_0", "Q6_K")}


class LlamaCpp(Engine):
    def __init__(self, file: str, precision: str) -> None:
        self._file = file
        self._tools = Path(os.environ["LLAMA_CPP_TOOLS"])
        self._threads = str(len(os.sched_getaffinity(0)))
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0
        weights, lm_head = FORMATS[precision]
        activations = "bfloat16" if precision == "bf16" else "int8 in blocks of 32 in the products, else float32"
        self.precision = {"weights": weights, "kv_cache": "float16", "lm_head": lm_head, "activations": activations}
        self.settings = {"slots": NUM_SLOTS, "context": NUM_SLOTS * SLOT_TOKENS, "single": "llama-bench"}

    def decode_speed(self, prompt: Ids, num_outputs: int) -> float:
        return self._bench("-p", "0", "-n", str(num_outputs), "-d", str(len(prompt)))

    def first_token_seconds(self, prompt: Ids) -> float:
        return len(prompt) / self._bench("-p", str(len(prompt)), "-n", "0")

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        if self._server is None:
            self._start_server()
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._complete, prompts, num_outputs))

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(timeout=30)

    def _bench(self, *arguments: str) -> float:
        command = [str(self._tools / "llama-bench"), "-m", self._file, "-t", self._threads, "-r", "1", "-o", "json"]
        result = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE)
        return float(json.loads(result.stdout)[0]["avg_ts"])

    def _start_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        context = str(NUM_SLOTS * SLOT_TOKENS)
        command = [str(self._tools / "llama-server"), "-m", self._file, "-t", self._threads, "-np", str(NUM_SLOTS)]
        command += ["-c", context, "--host", "127.0.0.1", "--port", str(self._port), "--no-webui"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if self._server.poll() is not None:
                    break
                time.sleep(0.2)
        raise RuntimeError("llama-server did not start")

    def _complete(self, prompt: Ids, num_outputs: int) -> Ids:
        body: dict[str, Any] = {"prompt": prompt, "n_predict": num_outputs, "ignore_eos": True, "temperature": 0}
        body |= {"cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=1200) as reply:
            return list(json.load(reply)["tokens"])


if __name__ == "__main__":
    serve(LlamaCpp)
