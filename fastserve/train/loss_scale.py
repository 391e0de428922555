"""Scaling of the loss for float16, whose gradients would else vanish (Micikevicius et al. 2018, section 3.2).

The scale belongs to a checkpoint, so that a resumed run goes on with the same one. bfloat16 has float32's range and
needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FIRST, _LEAST = 2.0**16, 1.0
_STEPS_TO_GROW = 2000


class LossScale:
    """The factor between loss and gradients: halved when gradients overflow, doubled after many steps without."""

    def __init__(self, is_wanted: bool) -> None:
        import torch

        self._is_wanted = is_wanted
        self._state = torch.tensor([_FIRST if is_wanted else 1.0, 0.0], dtype=torch.float64)  # scale, steps since

    @property
    def value(self) -> float:
        return float(self._state[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it; filled in place when one is loaded."""
        return {"loss_scale": self._state} if self._is_wanted else {}

    def shrink(self) -> bool:
        """Halve it after an overflow, so that the step can be done again; False where it cannot be the reason."""
        if not self._is_wanted or self.value <= _LEAST:
            return False
        self._state[0] /= 2
        self._state[1] = 0
        return True

    def grow(self) -> None:
        """Count a step whose gradients were finite."""
        if self._is_wanted:
            self._state[1] += 1
            if self._state[1] >= _STEPS_TO_GROW:
                self._state[0] *= 2
                self._state[1] = 0
