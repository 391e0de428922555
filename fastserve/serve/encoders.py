"""Endpoints of encoders: texts -> a Job of `offline/tasks` -> the engine -> JSON.

One `Encoders` serves all encoders of the server; a request names its model, or takes the first that is for the task.
Long inputs and answers are worked on in a thread, and what a client no longer waits for is not computed.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.arrays import ArrayRequest, PoolingRequest
from fastserve.core.errors import RequestError
from fastserve.engine.array_codec import to_numpy
from fastserve.offline.tasks.classification import classify, labelled, score_pairs
from fastserve.offline.tasks.embeddings import embed
from fastserve.offline.tasks.fill_mask import fill_mask
from fastserve.offline.tasks.question_answering import AnswerRules, answer_question
from fastserve.offline.tasks.text import EncoderText, Floats, Job, Piece
from fastserve.offline.tasks.token_classification import find_entities
from fastserve.serve.array_requests import ArrayRequests
from fastserve.serve.encoder_bodies import (
    ClassifyBody,
    EmbeddingsBody,
    EncoderBody,
    EntitiesBody,
    FillMaskBody,
    PoolingBody,
    QuestionBody,
    RerankBody,
    ScoreBody,
    pairs,
)
from fastserve.serve.errors import ApiError
from fastserve.serve.generation import in_thread_if_long
from fastserve.serve.tenants import tenant_of

_MANY_NUMBERS = 100_000  # of answers; what is made of more is made in a thread
_MAX_FILLED = 20_480  # texts that one request has made of masks: five for one mask of each text that it may have
_EMBEDDING = ("feature-extraction", "fill-mask")


class Encoders:
    """The encoders of a server.

    Args:
        requests: the way to the engine.
    """

    def __init__(self, requests: ArrayRequests) -> None:
        self._requests = requests
        self._arrays = requests.client.arrays
        self._texts: dict[str, EncoderText] = {}

    def add_routes(self, router: APIRouter) -> None:
        """The routes, in the order of the documentation."""
        post = router.post
        post("/v1/embeddings", summary="Texts to vectors")(self.embeddings)
        post("/pooling", summary="An encoder's scores, vectors or hidden states as they are")(self.pooling)
        post("/classify", summary="Labels of texts or pairs")(self.classify)
        for path in ("/score", "/v1/score"):
            post(path, summary="How well pairs of texts fit")(self.score)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            post(path, summary="Documents in the order of how well they fit a query")(self.rerank)
        post("/v1/question-answering", summary="Answers out of a context")(self.question_answering)
        post("/v1/token-classification", summary="Entities of texts")(self.token_classification)
        post("/v1/fill-mask", summary="Words for the masks of texts")(self.fill_mask)

    async def embeddings(self, body: EmbeddingsBody, request: Request) -> Response:
        """OpenAI's embeddings, with prompts of sentence-transformers."""
        name, text = await self._model(body.model, *_EMBEDDING, any_task=True)
        vectors, usage = await self._run(body, request, name, lambda: _embed(text, body), _size(body.input))
        data = [
            {"object": "embedding", "index": index, "embedding": _encode(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        return _json({"object": "list", "data": data, "model": name, "usage": usage})

    async def pooling(self, body: PoolingBody, request: Request) -> Response:
        """What the network says, without anything done to it."""
        name, text = await self._model(body.model, text_for="pooling")
        output = body.output or ("embed" if text.task == "feature-extraction" else "scores")

        def make() -> Job:
            job = _embed(text, body)
            pieces = [Piece(piece.input_ids, piece.type_ids, output) for piece in job.pieces]
            return job if output == "embed" else Job(pieces, lambda arrays: arrays)

        arrays, usage = await self._run(body, request, name, make, _size(body.input))
        data = [
            {"object": "pooling", "index": index, "data": _encode(array, body.encoding_format)}
            for index, array in enumerate(arrays)
        ]
        return _json({**self._head("pool", name), "data": data, "usage": usage})

    async def classify(self, body: ClassifyBody, request: Request) -> Response:
        """Labels with their scores; `probs` are in the order of the model's labels."""
        name, text = await self._model(body.model, "text-classification")

        def make() -> Job:
            return classify(text, body.inputs(), function=body.function_to_apply or "", truncate=body.truncate)

        scores, usage = await self._run(body, request, name, make, _size(body.input))
        data = []
        for index, row in enumerate(scores):
            best = labelled(text, row, body.top_k)
            found = {"index": index, "label": best[0]["label"], "probs": row.tolist(), "num_classes": len(row)}
            data.append({**found, "labels": best})
        return _json({**self._head("classify", name), "data": data, "usage": usage})

    async def score(self, body: ScoreBody, request: Request) -> Response:
        """A number per pair: of a cross-encoder, or the cosine of an embedding model."""
        name, text = await self._model(body.model, "text-classification", *_EMBEDDING)
        given = pairs(body.text_1, body.text_2, "text_2")
        size = _size(body.text_1) + _size(body.text_2)
        scores, usage = await self._run(
            body, request, name, lambda: score_pairs(text, given, truncate=body.truncate), size
        )
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return _json({**self._head("score", name), "data": data, "usage": usage})

    async def rerank(self, body: RerankBody, request: Request) -> Response:
        """Cohere's and Jina's form. Documents are cut at what the model takes, unless `truncate` is false."""
        name, text = await self._model(body.model, "text-classification", *_EMBEDDING)
        documents = body.texts()
        given = [(body.query, document) for document in documents]
        size = len(body.query) * len(documents) + _size(documents)
        scores, usage = await self._run(
            body, request, name, lambda: score_pairs(text, given, truncate=body.truncate), size
        )
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if body.return_documents:
            results = [{**result, "document": {"text": documents[result["index"]]}} for result in results]
        return _json({"id": f"rerank-{uuid.uuid4().hex}", "model": name, "usage": usage, "results": results})

    async def question_answering(self, body: QuestionBody, request: Request) -> Response:
        """The best spans of the context by SQuAD's rules; `start` and `end` count characters."""
        name, text = await self._model(body.model, "question-answering")
        rules = AnswerRules(
            body.top_k,
            body.max_answer_length,
            body.max_seq_length,
            body.doc_stride,
            body.handle_impossible_answer,
            body.no_answer_threshold,
        )
        answers, usage = await self._run(
            body, request, name, lambda: answer_question(text, body.question, body.context, rules), len(body.context)
        )
        return _json({**self._head("qa", name), "answers": answers, "usage": usage})

    async def token_classification(self, body: EntitiesBody, request: Request) -> Response:
        """Entities with their places in each text."""
        name, text = await self._model(body.model, "token-classification")
        ignored, strategy = tuple(body.ignore_labels), body.aggregation_strategy
        sentences = [body.input] if isinstance(body.input, str) else body.input

        def make() -> Job:
            return _together(
                [
                    find_entities(text, sentence, strategy=strategy, ignore_labels=ignored, stride=body.stride)
                    for sentence in sentences
                ]
            )

        found, usage = await self._run(body, request, name, make, _size(body.input))
        data = [{"index": index, "entities": entities} for index, entities in enumerate(found)]
        return _json({**self._head("entities", name), "data": data, "usage": usage})

    async def fill_mask(self, body: FillMaskBody, request: Request) -> Response:
        """The likeliest tokens of each mask."""
        name, text = await self._model(body.model, "fill-mask")
        sentences = [body.input] if isinstance(body.input, str) else body.input

        def make() -> Job:
            job = _together([fill_mask(text, item, top_k=body.top_k, targets=body.targets) for item in sentences])
            num_filled = body.top_k * sum(len(piece.rows) for piece in job.pieces)
            if num_filled > _MAX_FILLED:
                raise RequestError(
                    f"top_k for every mask makes {num_filled} texts, at most {_MAX_FILLED} at once; lower top_k, or "
                    "send fewer masks",
                    "top_k",
                )
            return job

        size = _size(body.input) + len(sentences) * _size(body.targets or [])
        found, usage = await self._run(body, request, name, make, size)
        data = [
            {"index": index, "masks": filled if isinstance(filled[0], list) else [filled]}
            for index, filled in enumerate(found)
        ]
        return _json({**self._head("fill", name), "data": data, "usage": usage})

    async def _model(
        self, name: str | None, *tasks: str, any_task: bool = False, text_for: str = ""
    ) -> tuple[str, EncoderText]:
        """The model of this name, or the first for one of `tasks` (any, without tasks or with any_task)."""
        self._requests.check_open()
        models = [info.name for info in self._arrays.models.values() if info.kind == "encoder"]
        if name is not None and name not in models:
            listed = f"its encoders are {', '.join(map(repr, models))}" if models else "it has no encoders"
            raise ApiError(f"there is no encoder {name!r} here; {listed}", 404, param="model", code="model_not_found")
        for candidate in models if name is None else [name]:
            text = self._texts.get(candidate)
            if text is None:
                text = self._texts[candidate] = await asyncio.to_thread(self._open, candidate)
            if text.task in tasks or not tasks or (any_task and name is not None):
                return candidate, text
            if name is not None:
                text.check_task(*tasks)
        wanted = text_for or " or ".join(tasks)
        raise ApiError(f"this server has no model for {wanted}", 404, param="model", code="model_not_found")

    def _open(self, name: str) -> EncoderText:
        folder = str(self._arrays.specs[name].options["model"])
        return EncoderText(ModelFolder.open(folder), self._arrays.models[name].max_len)

    def forget(self, name: str) -> None:
        """`name` was unloaded."""
        self._texts.pop(name, None)

    async def _run(
        self, body: EncoderBody, request: Request, model: str, make: Callable[[], Job], num_characters: int
    ) -> tuple[Any, dict[str, int]]:
        """What a job makes of the engine's answers, and the tokens that it took."""
        job = await in_thread_if_long(make, num_characters)
        name, now, tenant = f"arrays-{uuid.uuid4().hex}", time.monotonic(), tenant_of(request)
        requests: list[ArrayRequest] = [
            PoolingRequest(
                f"{name}-{index}",
                model,
                piece.input_ids,
                piece.type_ids,
                piece.head,
                piece.rows,
                now,
                body.priority,
                tenant,
            )
            for index, piece in enumerate(job.pieces)
        ]
        outputs = await self._requests.run(request, requests, job.num_tokens)
        arrays: list[Floats] = [to_numpy(output.arrays[""]) for output in outputs]
        usage = {"prompt_tokens": job.num_tokens, "total_tokens": job.num_tokens}
        if sum(array.size for array in arrays) > _MANY_NUMBERS:
            return await asyncio.to_thread(job.finish, arrays), usage
        return await in_thread_if_long(lambda: job.finish(arrays), num_characters), usage

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}


def _embed(text: EncoderText, body: EmbeddingsBody) -> Job:
    return embed(
        text,
        body.inputs(),
        prompt_name=body.prompt_name,
        dimensions=body.dimensions or 0,
        truncate=body.truncate,
    )


def _together(jobs: list[Job]) -> Job:
    """Several jobs as one; its answer is the list of theirs."""
    pieces = [piece for job in jobs for piece in job.pieces]

    def finish(arrays: list[Floats]) -> list[Any]:
        left = iter(arrays)
        return [job.finish([next(left) for _ in job.pieces]) for job in jobs]

    return Job(pieces, finish)


def _encode(vector: Floats, encoding: str) -> Any:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


def _size(texts: Any) -> int:
    """Characters of a text, or of all; token ids take no time."""
    if isinstance(texts, str):
        return len(texts)
    return sum(len(item) for item in texts if isinstance(item, str))


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
