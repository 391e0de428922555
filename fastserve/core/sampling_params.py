"""How the next token is chosen and when to stop, for one request.

The fields follow vLLM's and OpenAI's names. All values are checked here, once, so that nothing below needs to check
again: a `SamplingParams` that exists is valid. It crosses the process boundary as it is (msgspec encodes dataclasses).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastserve.core.errors import RequestError
from fastserve.core.structured_outputs import StructuredOutputs

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63
# Fields that a beam search may have.
WITH_BEAMS = {"n", "num_beams", "length_penalty", "early_stopping", "max_tokens", "seed"}
WITH_BEAMS |= {"ignore_eos", "stop_token_ids", "skip_special_tokens", "min_tokens"}
WITH_BEAMS |= {"no_repeat_ngram_size", "suppress_token_ids", "forced_eos_token_id"}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping options of one request.

    Args:
        n: number of independent completions of the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability sums to at least this (nucleus sampling).
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than `min_p` times the most probable one.
        repetition_penalty: divide positive (multiply negative) logits of tokens seen in prompt or output (CTRL, 2019).
        presence_penalty, frequency_penalty: subtract once, or per occurrence, for tokens seen in the output.
        logit_bias: token id -> value added to its logit.
        no_repeat_ngram_size: no run of so many tokens comes twice, the prompt's included (a source's are not); 0: no
            such rule.
        suppress_token_ids: tokens that are never made.
        forced_eos_token_id: the last of max_tokens is this one, if the answer has not ended before.
        seed: same seed, same tokens, whatever else is in the batch; None draws a fresh one.
        max_tokens: longest completion in tokens; None means up to the model's context length.
        min_tokens: stop tokens are masked until this many tokens were made.
        stop: strings that end the completion.
        stop_token_ids: token ids that end it, besides the model's own end tokens.
        include_stop_str_in_output: keep the stop string that ended the text.
        ignore_eos: do not stop at the model's end tokens.
        logprobs: report the log probability of each token and of this many most probable alternatives (0..20).
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form that the answer must have.
        num_beams: beams of a beam search for the most probable answers, of which the n best are given; 1: no search.
        length_penalty: a beam's score is its log probability / length ** this: above 0 favours long answers.
        early_stopping: when a search ends: True as soon as num_beams answers are found, False when no beam looks as if
            it became better than them, "never" when none can.

    Raises:
        RequestError: a value is out of its range; `param` names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    suppress_token_ids: tuple[int, ...] = ()
    forced_eos_token_id: int | None = None

    def __post_init__(self) -> None:
        stop: Any = self.stop  # one string, any sequence of strings, or None come from users
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "suppress_token_ids", tuple(self.suppress_token_ids or ()))
        self._check_range("n", self.n, 1, MAX_N)
        self._check_range("temperature", self.temperature, 0.0, 100.0)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}", "top_p")
        self._check_range("top_k", self.top_k, -1, 2**31 - 1)
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise RequestError(
                f"repetition_penalty must be above 0 and at most 100, not {self.repetition_penalty}",
                "repetition_penalty",
            )
        if self.max_tokens is not None:
            self._check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self._check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        self._check_range("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 1024)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            self._check_range("seed", self.seed, -MAX_SEED, 2 * MAX_SEED - 1)
        self._check_stops()
        self._check_logit_bias()
        self._check_beams()
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            raise RequestError(
                "ignore_eos and min_tokens would break the form that structured_outputs asks for; leave them out",
                "ignore_eos" if self.ignore_eos else "min_tokens",
            )

    @staticmethod
    def _check_range(name: str, value: float, low: float, high: float) -> None:
        if not (isinstance(value, (int, float)) and low <= value <= high):
            raise RequestError(f"{name} must be between {low} and {high}, not {value}", name)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(self.stop)}", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", "stop")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError("stop strings must be valid Unicode; one has half of a surrogate pair", "stop")
        if len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise RequestError(f"stop_token_ids takes at most {MAX_STOP_STRINGS} ids", "stop_token_ids")
        if any(not 0 <= token_id < 2**31 for token_id in self.stop_token_ids):
            raise RequestError("stop_token_ids must be token ids of the model", "stop_token_ids")

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if len(bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, not {len(bias)}", "logit_bias")
        for token_id, value in bias.items():
            if not 0 <= token_id < 2**31:
                raise RequestError(f"logit_bias has {token_id}, which is no token id", "logit_bias")
            self._check_range("logit_bias", value, -100.0, 100.0)

    def _check_beams(self) -> None:
        self._check_range("num_beams", self.num_beams, 1, MAX_N)
        self._check_range("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(
                f"early_stopping must be true, false or never, not {self.early_stopping}", "early_stopping"
            )
        if self.num_beams == 1:
            return
        if self.n > self.num_beams:
            raise RequestError(f"num_beams ({self.num_beams}) must be at least n ({self.n})", "num_beams")
        for item in fields(self):
            usual = (item.default, 0.0) if item.name == "temperature" else (item.default,)
            if item.name not in WITH_BEAMS and getattr(self, item.name) not in usual:
                raise RequestError(
                    f"{item.name} has no place in a beam search; leave out {item.name} or num_beams", item.name
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5
