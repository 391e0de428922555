"""Run one step of the model: plan -> batch -> forward -> logits -> tokens.

Holds the model, the KV cache and what the sampler must remember of each live sequence; decides nothing. Features with
state of their own (grammar masks, speculation, adapters) get files of their own that this calls once.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from fastserve.core.request import TokenLogprobs
from fastserve.engine.adapters import Adapters
from fastserve.engine.batch import make_batch
from fastserve.engine.beam_candidates import find_candidates
from fastserve.engine.grammar import GrammarCompiler, GrammarMasks
from fastserve.engine.kv_cache import KVCache
from fastserve.engine.sampler import SamplingState, gather_logprobs
from fastserve.engine.sources import Sources
from fastserve.engine.speculation import sample_verified
from fastserve.kernels.interface import Batch, RecordedStep
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import PagedContext
from fastserve.models.encoder_decoder import EncoderDecoder
from fastserve.models.model import ServingModel
from fastserve.scheduler.plan import PlanEntry, StepPlan, StepResult

_Ranges = list[tuple[int, int]]
_LOGIT_ROWS_AT_ONCE = 256  # bounds memory when a whole prompt's log probabilities are asked for


class ModelRunner:
    """One model on one device.

    Args:
        eos_token_ids: the model's end tokens, masked while a sequence is shorter than its min_tokens.
        max_model_len: tokens of the longest sequence.

    Attributes:
        report: how a step runs, for people.
    """

    def __init__(
        self,
        model: ServingModel,
        kernels: Kernels,
        kv_cache: KVCache,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        grammars: GrammarCompiler,
        adapters: Adapters,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv_cache = kv_cache
        self._eos_token_ids = eos_token_ids
        self._device = model.device
        self._states: dict[str, SamplingState] = {}
        self._prompts: dict[str, list[int]] = {}  # of requests that want prompt log probabilities
        self._adapters = adapters
        self._adapter_slots: dict[str, int] = {}  # of requests that have one
        self._sources = Sources(model, kernels, kv_cache) if isinstance(model, EncoderDecoder) else None
        self._masks = GrammarMasks(grammars)
        # Not a method: a recorded step keeps it, and must not keep this runner, whose memory goes when nobody has it.
        hidden = self._hidden = partial(_hidden, model, kv_cache, adapters)
        recorded: RecordedStep | str = "the model keeps its own cache"
        if not model.has_own_cache:
            model.reserve(max_model_len)
            recorded = kernels.record(lambda kernels, batch: model.head(hidden(kernels, batch), kernels), max_model_len)
        self._recorded = None if isinstance(recorded, str) else recorded
        self.report = f"step: operation by operation ({recorded})"
        if self._recorded:
            self.report = f"step: one native call of {self._recorded.num_operations} operations"

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan; its entries' keys and values are in the cache afterwards."""
        # Not in inference mode as a whole: entering it takes 40 microseconds when weights have been through the caches.
        self._drop(plan.freed)
        for entry in plan.entries:
            if entry.request is not None:
                self._admit(entry)
        if plan.copies:
            self._kernels.copy_blocks(self._kv_cache.parts, plan.copies)
        if self._sources is not None:
            plan = self._sources.compute(plan)
        if not plan.entries:
            return StepResult({})
        entries = [entry for entry in plan.entries if entry.samples]
        if self._masks:
            self._masks.prepare([(entry.request_id, _drafts(entry)) for entry in entries])
        batch, rows = make_batch(plan, self._kv_cache.block_size, self._device, self._prompts, self._adapter_slots)
        if self._sources is not None:
            self._sources.describe(batch)
        result = self._run_batch(plan, batch, entries, rows, plan.num_rounds)
        while result.num_rounds < plan.num_rounds:
            made = [result.made(name)[-1] for name in batch.request_ids]
            if not self._end_ids(entries).isdisjoint(made):
                break
            batch.advance(made)
            later = self._run_batch(plan, batch, entries, rows, plan.num_rounds - result.num_rounds)
            result.num_rounds += later.num_rounds
            for name in later.tokens:
                result.further.setdefault(name, []).extend(later.made(name))
        return result

    def _run_batch(
        self, plan: StepPlan, batch: Batch, entries: list[PlanEntry], row_ranges: _Ranges, num_rounds: int
    ) -> StepResult:
        """Compute a plan's batch and choose tokens for `entries`, those that sample; natively, in several rounds."""
        result, states = StepResult({}), [self._states[entry.request_id] for entry in entries]
        if self._recorded is not None and not self._prompts:
            is_greedy = all(state.is_plain_greedy for state in states)
            wants_logits = self._masks or any(state.sampling.logprobs is not None for state in states)
            is_plain = is_greedy and not wants_logits and len(batch.logit_rows) == len(entries)
            if not is_plain or any(state.sampling.forced_eos_token_id is not None for state in states):
                num_rounds = 1
            end_ids = self._end_ids(entries) if num_rounds > 1 else ()
            greedy = self._recorded.run(batch, is_greedy, num_rounds, end_ids)
            if is_plain:
                result.num_rounds = max(1, len(greedy) // max(1, len(entries)))
                for place, (entry, state) in enumerate(zip(entries, states, strict=True)):
                    made = greedy[place :: len(entries)]
                    for token_id in made:
                        state.count(token_id)
                    result.tokens[entry.request_id], *result.further[entry.request_id] = made
                return result
            logits = self._model.finish(self._recorded.logits())
        else:
            logits, greedy = self._run_scoring(plan, batch, row_ranges, result), []
        if entries:
            self._sample(result, logits, entries, greedy)
        return result

    def _end_ids(self, entries: list[PlanEntry]) -> set[int]:
        """Tokens after which rounds end: what ends any of the answers."""
        return {token_id for entry in entries for token_id in self._states[entry.request_id].stop_ids}

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """Logits of the entries that sample, a row each, for who chooses the tokens himself; else as `run`."""
        batch, rows = make_batch(plan, self._kv_cache.block_size, self._device, set(), {})
        if self._recorded is None:
            return self._run_scoring(plan, batch, rows, StepResult({}))
        self._recorded.run(batch, False)
        return self._model.finish(self._recorded.logits())

    @torch.inference_mode()
    def _run_scoring(self, plan: StepPlan, batch: Batch, row_ranges: _Ranges, result: StepResult) -> Tensor:
        """A step operation by operation, which scores prompts where asked; logits of the entries that sample."""
        hidden = self._hidden(self._kernels, batch)
        rows: list[int] = []
        for entry, (first, last) in zip(plan.entries, row_ranges, strict=True):
            if entry.request_id in self._prompts:
                result.prompt_logprobs[entry.request_id] = self._score_prompt(entry, hidden[first:last])
                if entry.samples:
                    del self._prompts[entry.request_id]
            if entry.samples:
                rows.extend(range(last - 1 - entry.num_drafts, last))
        if not rows:
            return hidden.new_empty(0)
        return self._model.logits(hidden if len(rows) == hidden.shape[0] else hidden[rows])

    def _admit(self, entry: PlanEntry) -> None:
        request = entry.request
        assert request is not None
        sampling = request.sampling
        stop_ids = sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos_token_ids)
        needs_prompt = sampling.repetition_penalty != 1.0
        state = SamplingState(sampling, stop_ids, frozenset(request.prompt_ids) if needs_prompt else frozenset())
        if sampling.no_repeat_ngram_size:
            block_size = self._kv_cache.block_size
            state.history.extend(request.prompt_ids[-(-request.num_source // block_size) * block_size :])
        for token_id in entry.output_ids:
            state.count(token_id)
        self._states[request.request_id] = state
        if self._sources is not None:
            self._sources.admit(request)
        if request.adapter:
            self._adapter_slots[request.request_id] = self._adapters.slot(request.adapter)
        self._masks.admit(request.request_id, sampling.structured_outputs, entry.output_ids)
        if sampling.prompt_logprobs is not None and not entry.output_ids:
            self._prompts[request.request_id] = request.prompt_ids

    def _drop(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            for kept in (self._states, self._prompts, self._adapter_slots):
                kept.pop(request_id, None)
            if self._sources is not None:
                self._sources.drop(request_id)
            self._masks.drop(request_id)
        if request_ids:
            self._model.release(request_ids)

    @torch.inference_mode()
    def _sample(self, result: StepResult, logits: Tensor, entries: list[PlanEntry], greedy: list[int]) -> None:
        """New tokens of the entries that sample; each has one row of logits [R, V] more than it has drafts.

        greedy: the largest of each row where all sequences are greedy and the step found it already.
        """
        states = [self._states[entry.request_id] for entry in entries]
        first_rows = [*accumulate((1 + entry.num_drafts for entry in entries[:-1]), initial=0)]
        beams = [place for place, state in enumerate(states) if state.sampling.num_beams > 1]
        if beams:
            rows = [first_rows[place] for place in beams]
            own, last = [states[place] for place in beams], [entries[place].token_ids[-1] for place in beams]
            found = find_candidates(logits if len(rows) == len(logits) else logits[rows], own, last, self._kernels)
            result.logprobs.update(zip((entries[place].request_id for place in beams), found, strict=True))
            entries = [entry for entry, state in zip(entries, states, strict=True) if state.sampling.num_beams == 1]
            if entries:
                self._sample(result, logits[sorted({*range(len(logits))} - {*rows})], entries, [])
            return
        allowed = self._mask(logits, entries, first_rows)
        known = greedy if allowed is logits else []
        made = sample_verified(allowed, [_drafts(entry) for entry in entries], states, self._kernels, known)
        self._add_logprobs(result, logits, entries, first_rows, [tokens[0] for tokens in made])
        for entry, tokens in zip(entries, made, strict=True):
            error = self._masks.accept(entry.request_id, tokens)
            if error is not None:
                result.errors[entry.request_id] = error
            result.tokens[entry.request_id] = tokens[0]
            if len(tokens) > 1:
                result.further[entry.request_id] = tokens[1:]

    def _mask(self, logits: Tensor, entries: list[PlanEntry], first_rows: list[int]) -> Tensor:
        """Logits with -inf where a grammar forbids a token: another object, and a copy where raw ones are reported."""
        biases = self._masks.biases()
        if not biases:
            return logits
        reports_raw = any(self._states[entry.request_id].sampling.logprobs is not None for entry in entries)
        logits = logits.clone() if reports_raw else logits.view_as(logits)
        for entry, row in zip(entries, first_rows, strict=True):
            bias = biases.get(entry.request_id)
            if bias is not None:
                logits[row : row + len(bias)].add_(torch.from_numpy(bias).to(self._device))
        return logits

    def _add_logprobs(
        self, result: StepResult, logits: Tensor, entries: list[PlanEntry], first_rows: list[int], tokens: list[int]
    ) -> None:
        wanted = [self._states[entry.request_id].sampling.logprobs for entry in entries]
        places = [place for place, num_top in enumerate(wanted) if num_top is not None]
        if places:
            rows, num_top = [first_rows[place] for place in places], [wanted[place] or 0 for place in places]
            gathered = gather_logprobs(logits[rows], [tokens[place] for place in places], num_top)
            result.logprobs.update(zip((entries[place].request_id for place in places), gathered, strict=True))

    def _score_prompt(self, entry: PlanEntry, hidden: Tensor) -> list[TokenLogprobs]:
        """Log probabilities of the prompt tokens that follow each position of this chunk."""
        prompt = self._prompts[entry.request_id]
        following = prompt[entry.start + 1 : entry.start + 1 + len(entry.token_ids)]
        num_top = self._states[entry.request_id].sampling.prompt_logprobs or 0
        scored: list[TokenLogprobs] = []
        for start in range(0, len(following), _LOGIT_ROWS_AT_ONCE):
            part = following[start : start + _LOGIT_ROWS_AT_ONCE]
            logits = self._model.logits(hidden[start : start + len(part)])
            scored.extend(gather_logprobs(logits, part, [num_top] * len(part)))
        return scored


def _hidden(model: ServingModel, kv_cache: KVCache, adapters: Adapters, kernels: Kernels, batch: Batch) -> Tensor:
    """[R, hidden_size] of the batch's logit rows."""
    adapters.step[:] = batch.adapter_slots
    ids, positions, _, rows = batch.tensors()
    return model.forward(ids, positions, PagedContext(kernels, kv_cache.keys, kv_cache.values, batch), rows)


def _drafts(entry: PlanEntry) -> list[int]:
    return entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
