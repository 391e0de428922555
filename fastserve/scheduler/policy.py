"""Who goes first: an opinion in a few methods. The mechanism (batching, memory, safety) is Scheduler's alone.

A policy sees sequences but changes none. `rank` orders sequences, lower first; the worst-ranked holder of memory is
the victim when blocks run out. Ranks of running sequences are taken before each step when the policy is preemptive;
the rank of a waiting one stands until it runs or until `review_time`, so a step never looks at the whole queue.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Protocol

from fastserve.core.errors import ConfigError
from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.sequence import Sequence

Rank = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know about the engine.

    Attributes:
        cost: how long steps take; it learns while the engine runs.
        max_batch_sequences: most sequences in one step.
    """

    cost: CostModel = field(default_factory=CostModel)
    max_batch_sequences: int = 64


class SchedulingPolicy(Protocol):
    """Order of service. Made with a PolicyContext as its only argument; what is not overridden is as in FCFS.

    Attributes:
        preemptive: a better-ranked waiting sequence may pause a running one when the batch is full.
        evicts: a better-ranked sequence that is to start may take the memory of paused ones. Without it, it waits for
            free memory: what was computed is not thrown away for order's sake.
        uses_cost: it orders by the cost model, which is then fitted to measured steps before the first request.
    """

    preemptive: bool = False
    evicts: bool = False
    uses_cost: bool = False

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        """A new sequence joins; `rank` follows."""

    def lane(self, sequence: Sequence) -> str:
        """Sequences of one lane wait in order of rank; between lanes `lane_rank` decides. Fixed for a sequence."""
        return ""

    def lane_rank(self, lane: str, first: Sequence, now: float) -> float:
        """Lower goes first; `first` heads the lane. Asked whenever a place is free, so it may change at any time."""
        return 0.0

    def rank(self, sequence: Sequence, now: float) -> Rank:
        """Sortable; lower is served first. Ties are broken by arrival."""
        return (sequence.request.arrival_time,)

    def review_time(self, sequence: Sequence, now: float) -> float:
        """When the rank just taken is to be taken again, should the sequence still wait; inf for never."""
        return math.inf

    def stable_tokens(self, sequence: Sequence) -> float:
        """How many more tokens a decoding sequence can make before its rank may change. A simulator may jump over them;
        0, the safe answer, forbids it. Asked only of preemptive policies."""
        return 0.0

    def service_before(self, sequence: Sequence) -> float:
        """Seconds of service after which a new sequence stands where this one is; those in front of it take the
        difference each before its turn. 0 where the rank alone says who is next."""
        return 0.0

    def on_start(self, sequence: Sequence, now: float) -> None:
        """It joins the batch, for the first time or after a pause."""

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        """A step computed `num_tokens` of it; `seconds` is its share of the step's time."""

    def on_finish(self, sequence: Sequence) -> None:
        """It finished or was aborted."""


def rank_of(policy: SchedulingPolicy, sequence: Sequence, now: float) -> Rank:
    """The policy's, but beams go first: a search that was begun is not parted."""
    return () if sequence.is_beam else policy.rank(sequence, now)


class FCFS(SchedulingPolicy):
    """First come, first served. Memory pressure evicts the latest arrival."""

    def __init__(self, context: PolicyContext) -> None:
        self._context = context


class Priority(FCFS):
    """The request's priority, smaller first, then arrival. A more urgent arrival pauses the least urgent runner."""

    preemptive = True
    evicts = True

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (sequence.request.priority, sequence.request.arrival_time)

    def stable_tokens(self, sequence: Sequence) -> float:
        return math.inf


_POLICIES = {
    "fcfs": "fastserve.scheduler.policy:FCFS",
    "priority": "fastserve.scheduler.policy:Priority",
    "skip-join-mlfq": "fastserve.scheduler.mlfq:SkipJoinMLFQ",
    "hrrn": "fastserve.scheduler.shortest:HRRN",
    "srpt-oracle": "fastserve.scheduler.shortest:SRPTOracle",
    "srpt-predicted": "fastserve.scheduler.shortest:SRPTPredicted",
    "aged-srpt": "fastserve.scheduler.shortest:AgedSRPT",
    "fair": "fastserve.scheduler.fair:VirtualTokenCounter",
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str, context: PolicyContext | None = None) -> SchedulingPolicy:
    """A policy by name, or an outside one as "module:Class".

    Raises:
        ConfigError: no such policy.
    """
    module_name, _, class_name = _POLICIES.get(name, name).partition(":")
    if not class_name:
        raise ConfigError(f"scheduler must be {', '.join(POLICY_NAMES)} or module:Class, not {name!r}")
    try:
        made: SchedulingPolicy = getattr(importlib.import_module(module_name), class_name)(context or PolicyContext())
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"scheduler {name!r} cannot be loaded: {error}") from error
    return made
