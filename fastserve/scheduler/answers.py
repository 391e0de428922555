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

    def __init__(self, eos_token_ids: Iterable[int], max_model_len: int) -> None:
        self.mean_prompt = 0.0
        self.mean_output = 0.0
        self._num_ended = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len = max_model_len

    def end_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer."""
        stops = frozenset(sampling.stop_token_ids)
        return stops if sampling.ignore_eos else stops | self._eos_token_ids

    def made(self, sequence: Sequence, result: StepResult) -> list[int]:
        """The step's tokens of a sequence, up to the first that ends it; none when it cannot go on."""
        request_id = sequence.request_id
        if request_id in result.errors:
            return []
        made = [result.tokens[request_id]]
        for token_id in result.further.get(request_id, ()):
            if self._ends(sequence, made[-1]):
                break
            made.append(token_id)
        return made

    def append(self, sequence: Sequence, made: list[int], result: StepResult, now: float) -> TokenOutput:
        """Append the last of `made`, before which the others are already; what to tell of all of them."""
        request_id, sampling = sequence.request_id, sequence.request.sampling
        if not made:
            return TokenOutput(request_id, [], FINISH_ERROR, error=result.errors[request_id])
        sequence.token_ids.append(made[-1])
        output = TokenOutput(request_id, made)
        if request_id in result.logprobs:
            output.logprobs = [result.logprobs[request_id]]
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            output.num_cached_tokens = sequence.num_cached_tokens
            output.scheduled_time = sequence.scheduled_time or now
            if sampling.prompt_logprobs is not None:
                output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        if self._ends(sequence, made[-1]):
            output.finish_reason, output.stop_token_id = FINISH_STOP, made[-1]
        elif sequence.num_output == sampling.max_tokens or len(sequence.token_ids) >= self._max_model_len:
            output.finish_reason = FINISH_LENGTH
        return output

    def observe_end(self, sequence: Sequence) -> None:
        """A sequence has ended, whatever for."""
        if sequence.num_output > 0:
            self._num_ended += 1
            weight = max(_MEMORY, 1.0 / self._num_ended)
            self.mean_output += weight * (sequence.num_output - self.mean_output)
            self.mean_prompt += weight * (sequence.num_prompt - sequence.num_cached_tokens - self.mean_prompt)

    def _ends(self, sequence: Sequence, token_id: int) -> bool:
        sampling = sequence.request.sampling
        is_end = not sampling.ignore_eos and token_id in self._eos_token_ids
        return is_end or token_id in sampling.stop_token_ids
