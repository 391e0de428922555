"""`fastserve.pipeline(task, model)`: the pipelines of transformers 4 and 5, by name and by answer, over our engine.

A script that imports `pipeline` from here instead of transformers goes on as it was: same task names, same arguments,
same dicts. Runs in this process; for many clients at once use the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.arrays import ArrayOutput, ModelSpec, PoolingRequest
from fastserve.core.errors import ConfigError, RequestError
from fastserve.engine.array_codec import to_numpy
from fastserve.offline.tasks.classification import classify, labelled
from fastserve.offline.tasks.embeddings import embed
from fastserve.offline.tasks.fill_mask import fill_mask
from fastserve.offline.tasks.question_answering import AnswerRules, answer_question
from fastserve.offline.tasks.text import EncoderText, Floats, Job, Piece
from fastserve.offline.tasks.token_classification import find_entities
from fastserve.offline.text_pipeline import TEXT_TASKS, TextPipeline, is_text_task

# Other names of the tasks.
_SAME = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


def pipeline(task: str = "", model: str = "", **options: Any) -> Callable[..., Any]:
    """A function that does a task with a model.

    Args:
        task: question-answering, text-classification (sentiment-analysis), token-classification (ner), fill-mask,
            feature-extraction, sentence-embedding (one vector per text), text-generation, text2text-generation,
            summarization, translation or translation_XX_to_YY; "" takes what the folder is for.
        model: folder or hub id; "" is the built-in model, which generates text.
        options: fields of EngineConfig, and defaults of what the function takes (`aggregation_strategy`, `top_k`, ...).

    Raises:
        ConfigError: a task that is not known, or that the model is not for.
        CheckpointError: the model cannot be loaded.

    Example:
        >>> answer = pipeline("question-answering", "./bert-qa")
        >>> answer(question="Who sleeps?", context="A fox sleeps in the wood.")["answer"]
    """
    folder = ModelFolder.open(str(model))
    task = _SAME.get(task, task) or folder.task
    if task == "text-generation":
        return _generate(str(model), options)
    if is_text_task(task):
        return TextPipeline(task, folder, options)
    if task not in _CALLS:
        raise ConfigError(
            f"there is no task {task!r}; known: {', '.join([*_CALLS, *_SAME, 'text-generation', *TEXT_TASKS])}"
        )
    wanted = ("feature-extraction", "fill-mask") if task in ("feature-extraction", "sentence-embedding") else (task,)
    if folder.task not in wanted:
        raise ConfigError(f"{model} is for {folder.task}, not for {task}")
    return EncoderPipeline(task, folder, options)


class EncoderPipeline:
    """One task with one encoder; see `pipeline`."""

    def __init__(self, task: str, folder: ModelFolder, options: Mapping[str, Any]) -> None:
        from fastserve.core.config import EngineConfig
        from fastserve.engine.runtimes import load_runtime

        own = {name: value for name, value in options.items() if name in EngineConfig.__dataclass_fields__}
        self._defaults = {name: value for name, value in options.items() if name not in own}
        self._call = _CALLS[task]
        self._runtime = load_runtime(ModelSpec(task, {**own, "model": str(folder.path)}))
        self._text = EncoderText(folder, self._runtime.info.max_len)
        self._ids = itertools.count()

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """As the pipeline of this task in transformers.

        Raises:
            RequestError: an input that is too long, empty, or of the wrong form.
        """
        return self._call(self, *inputs, **{**self._defaults, **arguments})

    @property
    def text(self) -> EncoderText:
        """The folder's tokenizer and labels."""
        return self._text

    def run(self, job: Job) -> Any:
        """What a job makes of the network's answers."""
        arrays: dict[str, Floats] = {}
        names = [str(next(self._ids)) for _ in job.pieces]
        for name, piece in zip(names, job.pieces, strict=True):
            self._runtime.add(PoolingRequest(name, "", piece.input_ids, piece.type_ids, piece.head, piece.rows))
        while self._runtime.has_work():
            for output in self._runtime.step():
                assert isinstance(output, ArrayOutput)
                arrays[output.request_id] = to_numpy(output.arrays[""])
        return job.finish([arrays[name] for name in names])


def _question_answering(
    pipe: EncoderPipeline,
    *inputs: Any,
    question: str | Sequence[str] = "",
    context: str | Sequence[str] = "",
    top_k: int = 1,
    doc_stride: int = 128,
    max_answer_len: int = 15,
    max_seq_len: int = 384,
    handle_impossible_answer: bool = False,
) -> Any:
    rules = AnswerRules(top_k, max_answer_len, max_seq_len, doc_stride, handle_impossible_answer)
    if inputs:
        items = inputs[0] if isinstance(inputs[0], list) else [inputs[0]]
        pairs = [(item["question"], item["context"]) for item in items]
    else:
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        pairs = list(zip(questions, contexts, strict=True))
    answers = [pipe.run(answer_question(pipe.text, *pair, rules)) for pair in pairs]
    answers = [found if top_k > 1 else found[0] for found in answers]
    return answers if len(answers) > 1 else answers[0]


def _text_classification(pipe: EncoderPipeline, inputs: Any, function_to_apply: str = "", **arguments: Any) -> Any:
    items = inputs if isinstance(inputs, list) else [inputs]
    pairs = [(item["text"], item.get("text_pair")) if isinstance(item, dict) else (item, None) for item in items]
    truncate = bool(arguments.pop("truncation", False))
    shows_all, top_k = "top_k" in arguments, arguments.pop("top_k", 1)
    _refuse(arguments)
    scores = pipe.run(classify(pipe.text, pairs, function=function_to_apply, truncate=truncate))
    found = [labelled(pipe.text, row, top_k) for row in scores]
    if not shows_all:
        best = [labels[0] for labels in found]
        return best[0] if isinstance(inputs, dict) else best
    return found if isinstance(inputs, list) else found[0]


def _token_classification(
    pipe: EncoderPipeline,
    inputs: Any,
    aggregation_strategy: str = "none",
    ignore_labels: Sequence[str] = ("O",),
    stride: int = 64,
) -> Any:
    found = [
        pipe.run(
            find_entities(
                pipe.text, sentence, strategy=aggregation_strategy, ignore_labels=tuple(ignore_labels), stride=stride
            )
        )
        for sentence in _as_list(inputs)
    ]
    return found if isinstance(inputs, list) else found[0]


def _fill_mask(pipe: EncoderPipeline, inputs: Any, top_k: int = 5, targets: Any = None) -> Any:
    wanted = [targets] if isinstance(targets, str) else targets
    found = [pipe.run(fill_mask(pipe.text, item, top_k=top_k, targets=wanted)) for item in _as_list(inputs)]
    return found if isinstance(inputs, list) and len(found) > 1 else found[0]


def _feature_extraction(pipe: EncoderPipeline, inputs: Any, truncation: bool = False) -> Any:
    """Hidden states of each token, [1, tokens, hidden] per text as nested lists."""
    job = embed(pipe.text, _as_list(inputs), truncate=truncation)
    pieces = [Piece(piece.input_ids, piece.type_ids, "hidden") for piece in job.pieces]
    found = pipe.run(Job(pieces, lambda arrays: [[array.tolist()] for array in arrays]))
    return found if isinstance(inputs, list) else found[0]


def _sentence_embedding(
    pipe: EncoderPipeline, inputs: Any, prompt_name: str = "", dimensions: int = 0, truncation: bool = True
) -> Any:
    """One vector per text, [numbers] float32."""
    job = embed(pipe.text, _as_list(inputs), prompt_name=prompt_name, dimensions=dimensions, truncate=truncation)
    found = pipe.run(job)
    return found if isinstance(inputs, list) else found[0]


def _generate(model: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """transformers' text-generation: `[{"generated_text": ...}]`, the prompt included."""
    from fastserve.core.sampling_params import SamplingParams
    from fastserve.offline.llm import LLM

    llm = LLM(model, **options)

    def generate(
        inputs: Any,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        num_return_sequences: int = 1,
        return_full_text: bool = True,
    ) -> Any:
        prompts = _as_list(inputs)
        sampling = SamplingParams(
            max_tokens=max_new_tokens, temperature=temperature if do_sample else 0.0, n=num_return_sequences
        )
        found = [
            [{"generated_text": (prompt if return_full_text else "") + choice.text} for choice in output.outputs]
            for prompt, output in zip(prompts, llm.generate(prompts, sampling), strict=True)
        ]
        return found if isinstance(inputs, list) else found[0]

    return generate


def _as_list(inputs: Any) -> list[str]:
    texts = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("give a text, or a list of texts")
    return texts


def _refuse(arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise RequestError(f"unknown argument {', '.join(arguments)}")


_CALLS: dict[str, Callable[..., Any]] = {
    "question-answering": _question_answering,
    "text-classification": _text_classification,
    "token-classification": _token_classification,
    "fill-mask": _fill_mask,
    "feature-extraction": _feature_extraction,
    "sentence-embedding": _sentence_embedding,
}
