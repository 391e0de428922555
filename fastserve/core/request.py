"""What goes into the engine and what comes out of it: token ids and numbers, never text.

These structs cross the process boundary as msgpack frames. A request for several completions (`n`) is split into
single ones where it enters (see `fork`), so that the scheduler only knows sequences.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec

from fastserve.core.sampling_params import MAX_SEED, SamplingParams

# Finish reasons, OpenAI's words: "stop" (end token, stop id or stop string), "length", and our own "abort" and "error".
FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
FINISH_ERROR = "error"


class Request(msgspec.Struct, frozen=True, tag=True):
    """One generation request for one sequence.

    Attributes:
        request_id: unique among live requests.
        prompt_ids: token ids of the prompt; at least one. For an encoder-decoder, those of the source, and then those
            that the decoder begins with.
        sampling: a valid SamplingParams with n == 1 and a seed.
        arrival_time: seconds on the system-wide monotonic clock (`time.monotonic`).
        priority: smaller is served first under the priority policy.
        tenant: who is asking; counted and shared fairly by tenant, never shown.
        adapter: LoRA adapter by name; "" for none. Requests of different ones share no cached prefix.
        num_source: how many of `prompt_ids` are an encoder's.
        model: which one, where several generate; "" is the server's own.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    arrival_time: float
    priority: int = 0
    tenant: str = ""
    adapter: str = ""
    num_source: int = 0
    model: str = ""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position: `token_ids[0]` is the token itself, the others the most probable ones.

    `rank` is the token's own rank (1 is the most probable). Values are natural logarithms of the softmax of the raw
    logits, before temperature, penalties and bias, as vLLM and OpenAI report them.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class Beam(msgspec.Struct, frozen=True, array_like=True):
    """An answer that beam search found; `score` is its log probability / length ** length_penalty."""

    token_ids: list[int]
    score: float
    finish_reason: str
    stop_token_id: int | None


class TokenOutput(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one request. The last one has a finish_reason.

    Attributes:
        token_ids: newly made tokens, in order (usually one; none in an abort).
        finish_reason: None while running; else one of the FINISH_ constants.
        stop_token_id: the end token or stop id that finished it, if one did; it is the last of `token_ids`.
        logprobs: one TokenLogprobs per new token when asked for.
        prompt_logprobs: with the first output when asked for; the first position has None.
        num_cached_tokens: prompt tokens taken from the prefix cache (set in the first output).
        scheduled_time: monotonic time of the first step that worked on it (set in the first output).
        error: a message for the user when finish_reason is "error".
        is_refused: the error is the request's, which cannot be served as asked, and not a failure of ours.
        beams: the n best answers of a beam search, in its only output; `token_ids` is empty.
        score: of this answer, when it is one of `beams` (see `as_answers`).
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    scheduled_time: float = 0.0
    error: str | None = None
    beams: list[Beam] | None = None
    score: float | None = None
    is_refused: bool = False

    def as_answers(self) -> list[TokenOutput]:
        """One output for each of `beams`, the best first; without beams this one."""
        return (
            [self]
            if self.beams is None
            else [
                TokenOutput(
                    self.request_id,
                    beam.token_ids,
                    beam.finish_reason,
                    beam.stop_token_id,
                    num_cached_tokens=self.num_cached_tokens,
                    scheduled_time=self.scheduled_time,
                    score=beam.score,
                )
                for beam in self.beams
            ]
        )


def fork(params: SamplingParams, seeds: Random, all_score: bool = False) -> list[SamplingParams]:
    """Split `params` with n completions into n valid single ones with distinct seeds (index i uses seed + i).

    Params without a seed take the next of `seeds`. Only the first one has prompt_logprobs, unless `all_score`. A beam
    search stays one: its request has n answers.
    """
    seed = params.seed if params.seed is not None else seeds.getrandbits(56)
    if params.num_beams > 1:
        return [replace(params, seed=seed)]
    first = replace(params, n=1, seed=seed)
    other = first if all_score else replace(first, prompt_logprobs=None)
    return [first, *(replace(other, seed=(seed + index) % (2 * MAX_SEED)) for index in range(1, params.n))]
