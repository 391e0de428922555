"""How long will the answer be? The answers to similar prompts, nearest in length, from the same tenant, say it best.

Prompts of an application share a template, so their lengths cluster, and so do their answers. A prediction is not a
number but the few lengths that came back before: with them one can ask what remains given what was made already.
Learns from finished requests only; `max_tokens` is never looked at (clients set it far too high).
"""

from __future__ import annotations

import bisect
import math
from collections import deque

_Row = tuple[int, int, int]  # prompt tokens, minus its number (newer first among equals), output tokens


class NearestLengths:
    """Output lengths of the requests whose prompts were nearest in length, the tenant's own first.

    Args:
        num_neighbours: how many.
        window: finished requests that are remembered.
        default: what to say before anything finished.
    """

    def __init__(self, num_neighbours: int = 8, window: int = 4096, default: int = 100) -> None:
        self._num_neighbours = num_neighbours
        self._window = window
        self._default = (default,)
        self._num_learned = 0
        self._order: deque[tuple[str, _Row]] = deque()
        self._everyone: list[_Row] = []
        self._by_tenant: dict[str, list[_Row]] = {}

    def samples(self, tenant: str, num_prompt: int) -> tuple[int, ...]:
        """Output lengths that it could have, equally probable; at least one."""
        found = _nearest(self._by_tenant.get(tenant, ()), num_prompt, self._num_neighbours)
        if len(found) < self._num_neighbours:
            found += _nearest(self._everyone, num_prompt, self._num_neighbours - len(found))
        return tuple(found) or self._default

    def learn(self, tenant: str, num_prompt: int, num_output: int) -> None:
        """A request finished with `num_output` tokens."""
        self._num_learned += 1
        row = (num_prompt, -self._num_learned, num_output)
        self._order.append((tenant, row))
        bisect.insort(self._everyone, row)
        bisect.insort(self._by_tenant.setdefault(tenant, []), row)
        if len(self._order) > self._window:
            tenant, row = self._order.popleft()
            own = self._by_tenant[tenant]
            for rows in (self._everyone, own):
                del rows[bisect.bisect_left(rows, row)]
            if not own:
                del self._by_tenant[tenant]


def expected_remaining(samples: tuple[int, ...], num_output: int) -> float:
    """Tokens still to come after `num_output`: the geometric mean over the samples that are longer.

    The geometric mean, because a chance to finish soon is worth serving. Where the answer has outgrown every sample,
    half of what was made so far.
    """
    logs = [math.log(length - num_output) for length in samples if length > num_output]
    return math.exp(sum(logs) / len(logs)) if logs else max(2.0, num_output / 2)


def _nearest(rows: list[_Row] | tuple[()], num_prompt: int, count: int) -> list[int]:
    """Output lengths of the `count` rows whose prompt lengths are nearest in proportion."""
    above = bisect.bisect_left(rows, (num_prompt, -math.inf, 0))
    below = above - 1
    found: list[int] = []
    while len(found) < count and (below >= 0 or above < len(rows)):
        if above == len(rows) or (below >= 0 and num_prompt * num_prompt < rows[below][0] * rows[above][0]):
            found.append(rows[below][2])
            below -= 1
        else:
            found.append(rows[above][2])
            above += 1
    return found
