"""Who takes the next step when several models of one process have work: weighted fair shares of measured step time.

Start-time fair queueing (Goyal et al., 1996): each model has a virtual time that grows by seconds / weight of its
steps; the one that is furthest behind goes next. A model that comes back from a pause begins at the present virtual
time, so that it neither owes nor is owed anything. Plain arithmetic over names: no clock, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping


class Arbiter:
    """`pick` one of those that have work, run its step, `charge` what it took."""

    def __init__(self) -> None:
        self._virtual: dict[str, float] = {}
        self._busy: frozenset[str] = frozenset()
        self._now = 0.0

    def pick(self, busy: Mapping[str, float]) -> str:
        """The name that goes next of `busy`, name -> weight; at least one."""
        for name in busy.keys() - self._busy:
            self._virtual[name] = max(self._virtual.get(name, 0.0), self._now)
        self._busy = frozenset(busy)
        chosen = min(busy, key=lambda name: self._virtual[name])
        self._now = self._virtual[chosen]
        return chosen

    def charge(self, name: str, seconds: float, weight: float) -> None:
        """`name` has used `seconds` of the machine."""
        self._virtual[name] = self._virtual.get(name, self._now) + seconds / weight

    def forget(self, name: str) -> None:
        """`name` is no more."""
        self._virtual.pop(name, None)
        self._busy -= {name}
