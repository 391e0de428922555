"""transformers 4's pipelines of encoder-decoders: text2text-generation, summarization, translation (transformers 5 has
none of them any more). The same arguments and dicts, over `LLM`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastserve.checkpoint.folder import TEXT_TO_TEXT, ModelFolder
from fastserve.core.errors import ConfigError, RequestError
from fastserve.core.sampling_params import WITH_BEAMS, SamplingParams

# Task -> the key of its answers.
TEXT_TASKS = {
    "text2text-generation": "generated_text",
    "summarization": "summary_text",
    "translation": "translation_text",
}
_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")
# transformers' arguments -> ours.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}
_TAKEN = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "length_penalty"),
    *("early_stopping", "no_repeat_ngram_size", "seed"),
}


def is_text_task(task: str) -> bool:
    """Whether this is a task of encoder-decoders."""
    return task in TEXT_TASKS or _PAIR.fullmatch(task) is not None


class TextPipeline:
    """One task with one encoder-decoder.

    Args:
        task: a key of TEXT_TASKS, or translation_XX_to_YY.
        options: fields of EngineConfig, and defaults of what a call takes.

    Raises:
        ConfigError: the folder is for something else.
    """

    def __init__(self, task: str, folder: ModelFolder, options: Mapping[str, Any]) -> None:
        from fastserve.core.config import EngineConfig
        from fastserve.offline.llm import LLM

        if folder.task != TEXT_TO_TEXT:
            raise ConfigError(f"{folder.path} is for {folder.task}, not for {task}")
        own = {name: value for name, value in options.items() if name in EngineConfig.__dataclass_fields__}
        self._arguments = {name: value for name, value in options.items() if name not in own}
        self._task = task
        pair = _PAIR.fullmatch(task)
        self._source, self._target = (pair[1], pair[2]) if pair is not None else ("", "")
        self._key = TEXT_TASKS.get(task, TEXT_TASKS["translation"])
        self._llm = LLM(str(folder.path), **own)

    def __call__(self, inputs: str | list[str], **arguments: Any) -> list[dict[str, str]] | list[list[dict[str, str]]]:
        """A dict for each answer: `generated_text`, `summary_text` or `translation_text`. With several texts and
        num_return_sequences above 1, a list of them for each text.

        Args:
            inputs: a text, or several.
            arguments: max_length, max_new_tokens, min_length, num_beams, do_sample and the like, as `generate` of
                transformers has them; src_lang and tgt_lang.

        Raises:
            RequestError: an argument or a language that is not known, a text that is too long.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError("give a text, or a list of texts")
        given = {**self._arguments, **arguments}
        source, target = given.pop("src_lang", self._source) or "", given.pop("tgt_lang", self._target) or ""
        text = self._llm.source_text
        assert text is not None
        if self._target and not text.pairs and not text.languages:
            source = target = ""  # a model of one pair, whose name says which
        prefix = "" if text.pairs and target else str(text.task(self._task).get("prefix", ""))
        params = _sampling(text.defaults(self._task), given)
        outputs = self._llm.translate(texts, target, source, params, prefix=prefix, use_tqdm=False)
        found = [[{self._key: choice.text.strip()} for choice in output.outputs] for output in outputs]
        if len(found) == 1 or params.n == 1:
            return [answer for answers in found for answer in answers]
        return found


def _sampling(defaults: dict[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """The arguments of a call over what the folder says."""
    values = dict(defaults)
    does_sample = bool(given.get("do_sample", values["temperature"] > 0))
    for name, value in given.items():
        if name in ("max_length", "min_length"):  # of all that the decoder has, its first token included
            values[f"{name[:3]}_tokens"] = max(1 if name == "max_length" else 0, int(value) - 1)
        elif name in _NAMES or name in _TAKEN:
            values[_NAMES.get(name, name)] = value
        elif name not in ("do_sample", "truncation", "clean_up_tokenization_spaces"):
            raise RequestError(f"unknown argument {name}")
    if does_sample:
        values["temperature"] = values["temperature"] or 1.0
        if values.get("num_beams", 1) > 1 and "num_beams" in given:
            raise RequestError("num_beams with do_sample is not supported; leave out one of them", "num_beams")
        values = {name: value for name, value in values.items() if name not in ("num_beams", "early_stopping")}
        values.pop("length_penalty", None)
    elif values.get("num_beams", 1) > 1:
        values = {name: value for name, value in values.items() if name in WITH_BEAMS} | {"temperature": 0.0}
    else:
        values["temperature"] = 0.0
    if values["max_tokens"] is not None:
        values["min_tokens"] = min(values["min_tokens"], values["max_tokens"])
    return SamplingParams(**values)
