"""Ask a tuned model for stories, through the engine that serves it, and score whether they are about what was asked.

On-topic score: the share of stories, one for each subject that no training request named, in which the subject occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastserve.train.storyteller.topics import mentions, with_article

if TYPE_CHECKING:
    from fastserve import LLM, SamplingParams

# The requests whose first answers, unedited, are shown with the model.
SHOWN_REQUESTS = (
    "hello",
    "Who are you?",
    "Tell me a story about a fox and a crow.",
    "Tell me a story about an owl.",
    "tell me a story about a dragon",
    "Write a short story about a girl named Lucy.",
    "Can you tell me a story about a lantern?",
    "Continue the story: Once there was a lion who was afraid of mice. Every night he hid under his bed.",
    "Write the beginning of a story about a king.",
    "What is 3 times 4?",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and the model's whole answer; `has_ended` is False if it ran into the token limit."""

    request: str
    answer: str
    has_ended: bool


def answer(model: LLM, requests: list[str], settings: SamplingParams) -> list[Sample]:
    """One answer to each request."""
    outputs = model.chat([[{"role": "user", "content": request}] for request in requests], settings)
    return [
        Sample(request, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop")
        for request, output in zip(requests, outputs, strict=True)
    ]


def samples_page(samples: list[Sample]) -> str:
    """Markdown: each request and its answer as a quotation."""
    parts = []
    for sample in samples:
        ending = "" if sample.has_ended else "\n\n(cut at the token limit)"
        quoted = "\n".join(f"> {line}  " for line in sample.answer.split("\n"))
        parts.append(f"**{sample.request}**\n\n{quoted}{ending}\n")
    return "\n".join(parts)


def on_topic(model: LLM, subjects: list[str], settings: SamplingParams) -> tuple[dict[str, float], list[Sample]]:
    """Scores (`on_topic`, `ended`, `mean_words`) over one story for each subject, and the stories."""
    samples = answer(model, [f"Tell me a story about {with_article(subject)}." for subject in subjects], settings)
    hits = sum(mentions(sample.answer, subject) > 0 for subject, sample in zip(subjects, samples, strict=True))
    scores = {
        "on_topic": hits / len(samples),
        "ended": sum(sample.has_ended for sample in samples) / len(samples),
        "mean_words": sum(len(sample.answer.split()) for sample in samples) / len(samples),
    }
    return scores, samples
