"""Ask a tuned model for stories and score whether they are about what was asked.

On-topic score: the share of stories, one for each subject that no training request named, in which the subject occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastserve.train.storyteller.recipe import Generation
from fastserve.train.storyteller.tokenizer import ASSISTANT, END_OF_TEXT, END_OF_TURN, PADDING, USER, token_id
from fastserve.train.storyteller.topics import mentions, with_article

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

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


def answer(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    requests: list[str],
    settings: Generation,
    seed: int,
    batch_size: int = 20,
) -> list[Sample]:
    """One sampled answer to each request."""
    import torch

    padding, end = token_id(tokenizer, PADDING), token_id(tokenizer, END_OF_TURN)
    device = next(model.parameters()).device
    model.eval()
    torch.manual_seed(seed)
    samples: list[Sample] = []
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        prompts = [tokenizer.encode(f"{END_OF_TEXT}{USER}{request}{END_OF_TURN}{ASSISTANT}").ids for request in part]
        width = max(map(len, prompts))
        ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, T]
        with torch.no_grad():
            tokens = model.generate(
                input_ids=ids,
                attention_mask=(ids != padding).long(),
                do_sample=True,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=0,
                repetition_penalty=settings.repetition_penalty,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=[end, token_id(tokenizer, END_OF_TEXT)],
                pad_token_id=padding,
            )
        for request, row in zip(part, tokens[:, width:].tolist(), strict=True):
            samples.append(Sample(request, tokenizer.decode(row, skip_special_tokens=True).strip(), end in row))
    return samples


def samples_page(samples: list[Sample]) -> str:
    """Markdown: each request and its answer as a quotation."""
    parts = []
    for sample in samples:
        ending = "" if sample.has_ended else "\n\n(cut at the token limit)"
        quoted = "\n".join(f"> {line}  " for line in sample.answer.split("\n"))
        parts.append(f"**{sample.request}**\n\n{quoted}{ending}\n")
    return "\n".join(parts)


def on_topic(
    model: LlamaForCausalLM, tokenizer: Tokenizer, subjects: list[str], settings: Generation, seed: int
) -> tuple[dict[str, float], list[Sample]]:
    """Scores (`on_topic`, `ended`, `mean_words`) over one story for each subject, and the stories."""
    samples = answer(
        model, tokenizer, [f"Tell me a story about {with_article(subject)}." for subject in subjects], settings, seed
    )
    hits = sum(mentions(sample.answer, subject) > 0 for subject, sample in zip(subjects, samples, strict=True))
    scores = {
        "on_topic": hits / len(samples),
        "ended": sum(sample.has_ended for sample in samples) / len(samples),
        "mean_words": sum(len(sample.answer.split()) for sample in samples) / len(samples),
    }
    return scores, samples
