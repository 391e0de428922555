"""The requests that engines are compared on: token ids in, fixed output lengths, the same for every engine.

Three cases, seeded: one short request (decode speed), one long prompt (time to first token), and thirty-two mixed
requests at once (throughput). Ids come from the beginning of the vocabulary, which every tokenizer here covers.
Plain Python: a peer in an environment of its own can load this file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

FIRST_ID, LAST_ID = 300, 7700  # past the special tokens and bytes, below the 8,000 tokens of the made tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: the prompt's ids, and how many tokens must come back (end tokens are ignored)."""

    token_ids: tuple[int, ...]
    num_outputs: int


def random_ids(count: int, seed: int, first: int = FIRST_ID, last: int = LAST_ID) -> tuple[int, ...]:
    """`count` ids, uniform over first .. last - 1."""
    generator = random.Random(seed)
    return tuple(generator.randrange(first, last) for _ in range(count))


def decode_case(input_length: int = 128, output_length: int = 128) -> Prompt:
    """One request whose time is spent making tokens."""
    return Prompt(random_ids(input_length, seed=1), output_length)


def prefill_case(input_length: int = 1024) -> Prompt:
    """One request whose time is spent reading its prompt."""
    return Prompt(random_ids(input_length, seed=2), 1)


def mixed_case(count: int = 32) -> list[Prompt]:
    """Requests with prompts of 64 to 512 tokens and outputs of 32 to 128, all there at the start."""
    generator = random.Random(3)
    prompts = []
    for index in range(count):
        length = generator.randint(64, 512)
        prompts.append(Prompt(random_ids(length, seed=1000 + index), generator.randint(32, 128)))
    return prompts


def uniform_case(count: int, input_length: int, output_length: int, seed: int = 4) -> list[Prompt]:
    """Requests of one size, each with its own ids."""
    return [Prompt(random_ids(input_length, seed=seed * 100_000 + index), output_length) for index in range(count)]


def fit(prompts: list[Prompt], vocab_size: int) -> list[Prompt]:
    """The same prompts for a smaller vocabulary: ids beyond it wrap around; unchanged where they fit."""
    return [replace(item, token_ids=tuple(token_id % vocab_size for token_id in item.token_ids)) for item in prompts]
