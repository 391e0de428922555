"""How long a step takes: seconds from its prefill tokens, decoding sequences and the context they attend to.

A linear model with non-negative coefficients, fitted by least squares to measured steps (a few at warm-up, then every
step, old ones fading). One slow step, a page fault say, cannot drag it away: a sample counts as at most a few times its
prediction. The scheduler uses it to share a step's time among sequences, the policies to predict first iterations and
to set quanta, the simulator instead of the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.scheduler.plan import StepPlan


@dataclass(slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        prefill_tokens: prompt tokens.
        decodes: sequences that take one token.
        prefill_pairs: (token, earlier token) pairs of prefill attention.
        decode_context: tokens that decoding sequences attend to, summed.
    """

    prefill_tokens: int = 0
    decodes: int = 0
    prefill_pairs: int = 0
    decode_context: int = 0

    def add(self, start: int, num_tokens: int) -> None:
        """Count one sequence's `num_tokens` tokens from position `start`."""
        if num_tokens == 1 and start > 0:
            self.decodes += 1
            self.decode_context += start + 1
        else:
            self.prefill_tokens += num_tokens
            self.prefill_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        work = cls()
        for entry in plan.entries:
            work.add(entry.start, len(entry.token_ids))
        return work


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds per step, per prefill token, per decoding sequence, per prefill pair and per decode context token."""

    step: float = 5e-3
    prefill_token: float = 2e-4
    decode: float = 1e-3
    prefill_pair: float = 0.0
    decode_context: float = 0.0

    def seconds(self, work: StepWork) -> float:
        return (
            self.step
            + self.prefill_token * work.prefill_tokens
            + self.decode * work.decodes
            + self.prefill_pair * work.prefill_pairs
            + self.decode_context * work.decode_context
        )


_FIRST_FITS = (8, 16, 32)  # steps: without a warm-up, the guess that it starts from should not stand for long


class CostModel:
    """Step times, learned from steps.

    Args:
        coefficients: the model before anything was measured.
        memory: measured steps that count; older ones fade with this time constant.
        refit_every: steps between fits.
    """

    def __init__(self, coefficients: Coefficients | None = None, memory: int = 2000, refit_every: int = 64) -> None:
        self.coefficients = coefficients or Coefficients()
        self.num_observed = 0
        self._fade = 1.0 - 1.0 / memory
        self._refit_every = refit_every
        self._observed: list[tuple[tuple[float, ...], float]] = []  # (row, seconds) since the last fit
        self._gram = [[0.0] * 5 for _ in range(5)]
        self._moments = [0.0] * 5

    def warm_up(self, measured: Iterable[tuple[StepWork, float]]) -> None:
        """Fit to measured (work, seconds), taken as they are."""
        for work, seconds in measured:
            self._keep(work, seconds)
        self._fit()

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from one step of the running engine."""
        if self.num_observed >= self._refit_every:
            seconds = min(seconds, 4.0 * self.coefficients.seconds(work))
        self._keep(work, seconds)
        if self.num_observed % self._refit_every == 0 or self.num_observed in _FIRST_FITS:
            self._fit()

    def account(self, plan: StepPlan, seconds: float, num_rounds: int = 1) -> list[float]:
        """Learn from a step, or some equal ones, and share the time: for each entry, as it adds to a step."""
        decode, decode_context = self.coefficients.decode, self.coefficients.decode_context
        work = StepWork()
        shares: list[float] = []
        for entry in plan.entries:
            num_tokens, start = len(entry.token_ids), entry.start
            if num_tokens == 1 and start > 0:  # what most entries are: `add` without its call
                work.decodes += 1
                work.decode_context += start + 1
                shares.append(decode + decode_context * (start + 1))
            else:
                work.add(start, num_tokens)
                shares.append(self.prefill_seconds(num_tokens, start))
        for _ in range(num_rounds):
            self.observe(work, seconds / num_rounds)
        scale = seconds / max(sum(shares), 1e-12)
        return [share * scale for share in shares]

    def prefill_seconds(self, num_tokens: int, start: int = 0) -> float:
        """Time that `num_tokens` prompt tokens after `start` cached ones add to steps."""
        pairs = num_tokens * start + num_tokens * num_tokens / 2
        return self.coefficients.prefill_token * num_tokens + self.coefficients.prefill_pair * pairs

    def decode_seconds(self, num_tokens: float, context: float, batch: int = 1) -> float:
        """Time that decoding `num_tokens` tokens from `context` on takes, as a share of steps of `batch` sequences."""
        each = self.coefficients.decode + self.coefficients.step / batch
        return num_tokens * (each + self.coefficients.decode_context * (context + num_tokens / 2))

    def first_iteration_seconds(self, num_tokens: int, start: int = 0) -> float:
        """A step that prefills `num_tokens` tokens alone."""
        return self.coefficients.step + self.prefill_seconds(num_tokens, start)

    def _keep(self, work: StepWork, seconds: float) -> None:
        """Note what was measured; the caller may go on to change `work`."""
        row = (1.0, work.prefill_tokens, work.decodes, work.prefill_pairs, work.decode_context)
        self._observed.append((row, seconds))
        self.num_observed += 1

    def _accumulate(self, row: tuple[float, ...], seconds: float) -> None:
        weight = 1.0 / max(seconds, 1e-6) ** 2  # relative errors: a decode step counts as much as a long prefill
        fade, gram, moments = self._fade, self._gram, self._moments
        for i in range(5):
            scaled, line = weight * row[i], gram[i]
            for j in range(i, 5):
                line[j] = fade * line[j] + scaled * row[j]
            moments[i] = fade * moments[i] + scaled * seconds

    def _fit(self) -> None:
        """Non-negative least squares by coordinate descent, held to the last fit where the steps do not tell."""
        for row, seconds in self._observed:
            self._accumulate(row, seconds)
        self._observed.clear()
        now = self.coefficients
        prior = [now.step, now.prefill_token, now.decode, now.prefill_pair, now.decode_context]
        gram = [[self._gram[min(i, j)][max(i, j)] for j in range(5)] for i in range(5)]
        moments = list(self._moments)
        for i in range(5):
            pull = 1e-4 * gram[i][i]
            gram[i][i] += pull
            moments[i] += pull * prior[i]
        values = list(prior)
        for _ in range(200):
            for i in range(5):
                if gram[i][i] > 0.0:
                    rest = sum(gram[i][j] * values[j] for j in range(5) if j != i)
                    values[i] = max(0.0, (moments[i] - rest) / gram[i][i])
        self.coefficients = Coefficients(*values)


def warm_up_shapes(max_sequences: int, max_tokens: int) -> list[tuple[int, int, int]]:
    """Steps worth timing before the first request, the small ones first: (sequences, tokens of each, start)."""
    widths = sorted({1, max(1, max_sequences // 4), max_sequences})
    lengths = sorted({min(length, max_tokens) for length in (16, 64, 256)})
    short = [(width, 1, 15) for width in widths] + [(1, length, 0) for length in lengths]
    return short + [(width, 1, 255) for width in widths] + [(1, lengths[-1], 256)]
