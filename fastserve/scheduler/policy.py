"""Who goes first: an opinion in four methods. The mechanism (batching, memory, safety) is Scheduler's alone.

A policy sees sequences but changes none. `rank` orders sequences, lower first; the worst-ranked holder of memory is
the victim when blocks run out. A rank is taken when a sequence joins the queue and must not depend on later events.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from fastserve.core.errors import ConfigError
from fastserve.scheduler.sequence import Sequence

Rank = tuple[float, ...]


class SchedulingPolicy(Protocol):
    """Order of service.

    Attributes:
        preemptive: a better-ranked waiting sequence may pause a running one when the batch is full.
    """

    preemptive: bool

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        """A new sequence joins."""

    def rank(self, sequence: Sequence, now: float) -> Rank:
        """Sortable; lower is served first. Ties are broken by arrival."""

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        """A step computed `num_tokens` of it; `seconds` is its share of the step's time."""

    def on_finish(self, sequence: Sequence) -> None:
        """It finished or was aborted."""


class FCFS:
    """First come, first served. Memory pressure evicts the latest arrival."""

    preemptive = False

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        pass

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (sequence.request.arrival_time,)

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        pass

    def on_finish(self, sequence: Sequence) -> None:
        pass


class Priority(FCFS):
    """The request's priority, smaller first, then arrival. A more urgent arrival pauses the least urgent runner."""

    preemptive = True

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (sequence.request.priority, sequence.request.arrival_time)


_POLICIES: dict[str, type[Any]] = {"fcfs": FCFS, "priority": Priority}


def make_policy(name: str) -> SchedulingPolicy:
    """A policy by name, or an outside one as "module:Class".

    Raises:
        ConfigError: no such policy.
    """
    if name in _POLICIES:
        policy: SchedulingPolicy = _POLICIES[name]()
        return policy
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise ConfigError(f"scheduler must be {', '.join(_POLICIES)} or module:Class, not {name!r}")
    try:
        made: SchedulingPolicy = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"scheduler {name!r} cannot be loaded: {error}") from error
    return made
