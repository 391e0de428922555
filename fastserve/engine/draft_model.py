"""Guesses by a smaller model of the same vocabulary (Leviathan et al., 2023), for all sequences of a batch at once.

Its keys and values have a cache of their own, under the block ids that the scheduler gave the sequence: whoever loses
its blocks is read anew. A guess is drawn with the random number of its position, as the token will be (`sampler.py`),
so that sampled tokens are guessed well, too. What is verified, and how, is as for any guess (`speculation.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import ConfigError
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sampler import SamplingState, sample
from fastserve.models.loader import LoadedModel
from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.drafts import GUESS_PRIOR, GUESS_RATE, num_worthwhile
from fastserve.scheduler.plan import PlanEntry, StepPlan
from fastserve.scheduler.sequence import Sequence

MAX_GUESSES = 4
_REST = 128  # steps without guesses where they do not pay, before they are tried again


@dataclass(slots=True)
class _Draft:
    """One sequence: its tokens whose keys are in the draft's cache, and the guesses for its tokens from `first` on."""

    state: SamplingState
    num_preemptions: int
    num_computed: int = 0
    first: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """A `Drafter`: `guess` before each plan, which then asks for what was guessed.

    Args:
        runner: runs the model, over a cache with as many blocks as that of the model that is served.
        vocab_size: of the model that is served.
        max_tokens: most tokens of a step, as when a prompt is read.
        cost: how long steps of the other model take; None guesses always, as many as may be.
    """

    def __init__(
        self, loaded: LoadedModel, runner: ModelRunner, vocab_size: int, max_tokens: int, cost: CostModel | None
    ) -> None:
        self._kernels = loaded.kernels
        self._longest = loaded.model.shape.max_positions
        self._top_id = loaded.model.shape.vocab_size - 1
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._cost = cost
        self._chance = GUESS_PRIOR  # that a guess is right
        self._round_seconds = 0.0  # for one guess for each sequence of a batch
        self._num_rests = 0
        self._drafts: dict[str, _Draft] = {}
        self._ended: list[str] = []

    def propose(self, sequence: Sequence, limit: int, num_sequences: int) -> list[int]:
        draft = self._drafts.get(sequence.request_id)
        if draft is None or draft.first != len(sequence.token_ids):
            return []
        return draft.guesses[: max(0, limit)]

    def forget(self, request_id: str) -> None:
        self._ended.append(request_id)
        self._drafts.pop(request_id, None)

    def guess(self, sequences: list[Sequence], block_size: int) -> None:
        """Make guesses for sequences that decode, as far as their blocks have room, after a look at what came of the
        last ones."""
        for sequence in sequences:
            self._follow(sequence)
        num_guesses = self._num_guesses(sequences)
        ended, self._ended = self._ended, []
        if ended:
            self._runner.run(StepPlan([], freed=ended))
        if not num_guesses:
            return
        started = time.perf_counter()
        entries = list(self._unread(sequences, block_size))
        is_reading = sum(len(entry.token_ids) for entry in entries) > 2 * len(entries)
        guessing = {entry.request_id for entry in entries if entry.samples}
        left = [(item, self._drafts[item.request_id]) for item in sequences if item.request_id in guessing]
        number = 0
        while entries and number < num_guesses:
            number += 1
            for (_, draft), token_id in zip(left, self._draw(entries, left), strict=True):
                draft.guesses.append(token_id)
            left = [
                (sequence, draft)
                for sequence, draft in left
                if number < num_guesses
                and draft.num_computed < min(self._longest, len(sequence.block_ids) * block_size)
            ]
            entries = [self._entry(sequence, draft, draft.guesses[-1:]) for sequence, draft in left]
        if number and not is_reading:
            seconds = (time.perf_counter() - started) / number
            known = self._round_seconds or seconds
            self._round_seconds = known + GUESS_RATE * (min(seconds, 4 * known) - known)

    def _follow(self, sequence: Sequence) -> None:
        """Learn from the tokens that came since the last guesses, and keep what they left valid."""
        draft = self._drafts.get(sequence.request_id)
        if draft is None or draft.num_preemptions != sequence.num_preemptions:
            draft = _Draft(_state(sequence), sequence.num_preemptions)
            self._drafts[sequence.request_id] = draft
        num_right = 0
        for guess, token_id in zip(draft.guesses, sequence.token_ids[draft.first :], strict=False):
            self._chance += GUESS_RATE * ((guess == token_id) - self._chance)
            if guess != token_id:
                break
            num_right += 1
        draft.num_computed = min(draft.num_computed, draft.first + num_right, len(sequence.token_ids) - 1)
        draft.first, draft.guesses = len(sequence.token_ids), []

    def _num_guesses(self, sequences: list[Sequence]) -> int:
        if not sequences or self._cost is None:
            return MAX_GUESSES if sequences else 0
        if self._num_rests:
            self._num_rests -= 1
            return 0
        context = sum(len(sequence.token_ids) for sequence in sequences) // len(sequences)
        each = self._round_seconds / len(sequences)
        found = num_worthwhile(self._cost, self._chance, context, len(sequences), MAX_GUESSES, each)
        if not found:
            self._num_rests, self._chance = _REST, GUESS_PRIOR
        return found

    def _unread(self, sequences: list[Sequence], block_size: int) -> Iterator[PlanEntry]:
        """What the model has not read of each sequence, within a step's tokens."""
        tokens_left = self._max_tokens
        for sequence in sequences:
            draft, length = self._drafts[sequence.request_id], len(sequence.token_ids)
            unread = sequence.token_ids[draft.num_computed : draft.num_computed + tokens_left]
            token_ids = [min(token_id, self._top_id) for token_id in unread]  # vocabularies may be padded differently
            if token_ids and length <= min(self._longest, len(sequence.block_ids) * block_size):
                tokens_left -= len(token_ids)
                yield self._entry(sequence, draft, token_ids)

    def _entry(self, sequence: Sequence, draft: _Draft, token_ids: list[int]) -> PlanEntry:
        start, draft.num_computed = draft.num_computed, draft.num_computed + len(token_ids)
        samples = draft.num_computed >= len(sequence.token_ids)
        request = None if start else sequence.request
        return PlanEntry(sequence.request_id, token_ids, start, sequence.block_ids[:], samples, request)

    def _draw(self, entries: list[PlanEntry], left: list[tuple[Sequence, _Draft]]) -> list[int]:
        logits = self._runner.logits(StepPlan(entries))
        for sequence, draft in left:
            draft.state.num_output = sequence.num_output + len(draft.guesses)
        states = [draft.state for _, draft in left]
        return sample(logits[:, : self._vocab_size], states, self._kernels) if states else []


def _state(sequence: Sequence) -> SamplingState:
    """How its tokens are drawn, less what only the other model's sampler knows (penalties, masks)."""
    asked = sequence.request.sampling
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    return SamplingState(SamplingParams(**{name: getattr(asked, name) for name in names}), ())


def check_draft(folder: ModelFolder, loaded: LoadedModel, draft_folder: ModelFolder, draft: LoadedModel) -> None:
    """Refuse a draft model that cannot guess for the model in `folder`.

    Raises:
        ConfigError: one of them keeps its own cache, or they have different vocabularies.
    """
    for one, where in ((loaded, folder), (draft, draft_folder)):
        if one.model.has_own_cache:
            raise ConfigError(f"draft_model needs models that FastServe computes itself, which {where.path} is not")
    ours, theirs = (Tokenizer.load(where).vocabulary for where in (folder, draft_folder))
    if ours != theirs:
        number = len(dict(ours.items() ^ theirs.items()))
        raise ConfigError(
            f"draft_model {draft_folder.path} has another vocabulary than {folder.path} ({number} tokens differ), so "
            "its guesses would mean nothing; choose a smaller model of the same family"
        )
