"""What becomes of the tokens that a step made: where an answer ends, what its caller is told, how long answers are."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.core.request import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, TokenOutput
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.plan import StepResult
from fastserve.scheduler.sequence import Sequence

_MEMORY = 0.02  # weight of the newest request in means


class Answers:
    """Ends of answers.

    Attributes:
        mean_prompt, mean_output: tokens of requests of late, to compute and made; 0 before any ended.
    """

    def __init__(self, eos_token_ids: Iterable[int]) -> None:
        self.mean_prompt = 0.0
        self.mean_output = 0.0
        self._num_ended = 0
        self._eos_token_ids = frozenset(eos_token_ids)

    def end_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return ends.union(sampling.stop_token_ids) if sampling.stop_token_ids else ends

    def made(self, sequence: Sequence, result: StepResult) -> list[int]:
        """The step's tokens of a sequence, up to the first that ends it; none when it cannot go on."""
        made = [] if sequence.request_id in result.errors else result.made(sequence.request_id)
        return made[: next((place for place, token_id in enumerate(made, 1) if token_id in sequence.end_ids), None)]

    def append(self, sequence: Sequence, made: list[int], result: StepResult, now: float) -> TokenOutput:
        """Append the step's token, the last of `made` where guesses were verified; returns what to tell."""
        request_id = sequence.request_id
        if request_id in result.errors:
            return TokenOutput(request_id, [], FINISH_ERROR, error=result.errors[request_id], is_refused=True)
        made = made or [result.tokens[request_id]]
        sequence.token_ids.append(made[-1])
        output = TokenOutput(request_id, made)
        if request_id in result.logprobs:
            output.logprobs = [result.logprobs[request_id]]
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            output.num_cached_tokens, output.scheduled_time = sequence.num_cached_tokens, sequence.scheduled_time or now
            if sequence.request.sampling.prompt_logprobs is not None:
                output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        if made[-1] in sequence.end_ids:
            output.finish_reason, output.stop_token_id = FINISH_STOP, made[-1]
        elif len(sequence.token_ids) >= sequence.max_length:
            output.finish_reason = FINISH_LENGTH
        return output

    def observe_end(self, sequence: Sequence) -> None:
        """A sequence has ended, whatever for."""
        if sequence.num_output > 0:
            self._num_ended += 1
            weight = max(_MEMORY, 1.0 / self._num_ended)
            self.mean_output += weight * (sequence.num_output - self.mean_output)
            self.mean_prompt += weight * (sequence.num_prompt - sequence.num_cached_tokens - self.mean_prompt)
