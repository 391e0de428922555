"""Bodies of requests to encoders: embeddings as OpenAI has them; pooling, classify and score as vLLM; rerank as Cohere
and Jina; question answering, token classification and masks as transformers' pipelines.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastserve.core.errors import RequestError
from fastserve.serve.openai import MAX_PROMPTS, Body, Name, Priority, TokenIds

_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class EncoderBody(Body):
    """What all have. `truncate` cuts a text that is too long at its end, which is refused otherwise."""

    model: Name | None = None
    priority: Priority = 0
    truncate: bool = False


class EmbeddingsBody(EncoderBody):
    input: str | _Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    prompt_name: Name = ""

    def inputs(self) -> list[str] | list[list[int]]:
        """One text or list of ids per vector."""
        given = self.input
        if isinstance(given, str):
            return [given]
        return [given] if isinstance(given[0], int) else given


class PoolingBody(EmbeddingsBody):
    """`output`: the head's raw scores (the default where there is a head), the text's vector, or each token's."""

    output: Literal["scores", "embed", "hidden"] | None = None


class ClassifyBody(EncoderBody):
    input: str | _Texts
    text_pair: str | _Texts | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None

    def inputs(self) -> list[tuple[str, str | None]]:
        """Texts, or pairs of them."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if self.text_pair is None:
            return [(text, None) for text in texts]
        return list(pairs(self.input, self.text_pair, "text_pair"))


class ScoreBody(EncoderBody):
    text_1: str | _Texts
    text_2: str | _Texts


class RerankDocument(Body):
    text: str


class RerankBody(EncoderBody):
    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1, max_length=MAX_PROMPTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    truncate: bool = True

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [item if isinstance(item, str) else item.text for item in self.documents]


class QuestionBody(EncoderBody):
    question: str
    context: str
    top_k: Annotated[int, Field(ge=1, le=20)] = 1
    max_answer_length: Annotated[int, Field(ge=1, le=1000)] = 30
    max_seq_length: Annotated[int, Field(ge=0)] = 384
    doc_stride: Annotated[int, Field(ge=0)] = 128
    handle_impossible_answer: bool = False
    no_answer_threshold: float = 0.0


class EntitiesBody(EncoderBody):
    input: str | _Texts
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: Annotated[list[str], Field(max_length=1024)] = Field(default=["O"])
    stride: Annotated[int, Field(ge=0)] = 64


class FillMaskBody(EncoderBody):
    input: str | _Texts
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    targets: Annotated[list[str], Field(max_length=1024)] | None = None


def pairs(first: str | list[str], second: str | list[str], name: str) -> list[tuple[str, str]]:
    """One with one, one with each of several, or as many with as many.

    Raises:
        RequestError: as many texts as do not go together.
    """
    left = [first] if isinstance(first, str) else first
    right = [second] if isinstance(second, str) else second
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise RequestError(f"{name} has {len(right)} texts for {len(left)}; give as many, or one text first", name)
    return list(zip(left, right, strict=True))
