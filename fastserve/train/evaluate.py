"""`fastserve eval MODEL`: measure a folder on a corpus, on examples of a task, or with lm-evaluation-harness.

Networks are transformers' own, in float32. The harness runs in process on the same network, or against any server that
speaks OpenAI's completions, ours among them: then what is measured is what is served.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.network import SAFELY, check_length, num_positions, open_tokenizer

_ROWS = 8  # windows in a pass


def perplexity(
    model: str, corpus: Path, length: int = 512, max_tokens: int = 200_000, text_key: str = "text"
) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte of a causal network on a text.

    Args:
        corpus: a prepared folder (its validation split), or a raw file or folder of any known kind.
        length: window in tokens; each is read by itself, after the beginning-of-text token where there is one.
        text_key: key of the text in raw JSON lines and Parquet files.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fastserve.train.objectives import IGNORED, label_loss

    tokenizer = open_tokenizer(Path(model))
    network = _opened(AutoModelForCausalLM, model)
    length = min(length, num_positions(network.config) or length)
    begin = tokenizer.bos_token_id
    total, tokens, num_bytes = 0.0, 0, 0
    rows: list[list[int]] = []
    for text in _texts(corpus, text_key):
        ids = tokenizer.encode(text, add_special_tokens=False)
        num_bytes += len(text.encode())
        step = length - (begin is not None)
        rows += [([] if begin is None else [begin]) + ids[start : start + step] for start in range(0, len(ids), step)]
        tokens += len(ids)
        if tokens >= max_tokens:
            break
    if not rows:
        raise ConfigError(f"{corpus} has no text to measure on")
    counted = 0
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        labels = torch.tensor([row[1:] + [IGNORED] * (width - len(row) + 1) for row in part])
        with torch.no_grad():
            total += float(label_loss(network(ids, use_cache=False).logits, labels))
        counted += int((labels != IGNORED).sum())
    loss = total / max(1, counted)
    return {
        "loss": round(loss, 6),
        "perplexity": round(math.exp(min(loss, 50)), 4),
        "bits_per_byte": round(loss / math.log(2) * tokens / num_bytes, 5),
        "tokens": counted,
    }


def score_examples(task: str, model: str, data: Path, settings: Any) -> dict[str, float]:
    """The scores of a tuned folder on examples, as fine-tuning measures them."""
    import torch

    from fastserve.train.finetune.examples import read_examples
    from fastserve.train.finetune.run import KINDS, open_network

    kind = KINDS[task](open_tokenizer(Path(model)), settings)
    rows = read_examples(data)[: settings.evaluate_examples or None]
    network = open_network(kind, model, None).eval()
    check_length(network.config, settings.max_length, "max_length")
    with torch.no_grad():
        found: dict[str, float] = kind.score(network, rows)
    return {**found, "examples": len(rows)}


def harness(model: str, tasks: list[str], *, url: str = "", limit: int = 0, task_folder: str = "") -> dict[str, Any]:
    """lm-evaluation-harness on `tasks`: in process, or against the server at `url`; returns its results by task."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--harness needs lm-evaluation-harness: pip install 'lm_eval[api]'") from None
    if url:
        arguments = {
            "model": "local-completions",
            "model_args": f"base_url={url.rstrip('/')}/v1/completions,model={served_name(url)},tokenizer={model}",
        }
    else:
        arguments = {"model": "hf", "model_args": f"pretrained={model},dtype=float32,device=cpu"}
    manager = TaskManager(include_path=task_folder or None)
    try:
        found = lm_eval.simple_evaluate(tasks=tasks, limit=limit or None, task_manager=manager, **arguments)
    except KeyError as error:
        raise ConfigError(f"the harness knows no task {error}") from error
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }


def served_name(url: str) -> str:
    """The name of the first model that a server lists; ConfigError where it does not answer."""
    import json
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of a server; write for example http://127.0.0.1:8000")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"the server at {url} does not list its models: {error}") from error


def _texts(corpus: Path, text_key: str) -> Any:
    from fastserve.train.data.shards import split_texts
    from fastserve.train.tokenizer import texts_of

    return split_texts(corpus, "validation") if (corpus / "report.json").exists() else texts_of([str(corpus)], text_key)


def _opened(kind: Any, model: str) -> Any:
    import torch

    try:
        return kind.from_pretrained(model, dtype=torch.float32, **SAFELY).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} cannot be opened for this: {str(error).splitlines()[0]}") from error
