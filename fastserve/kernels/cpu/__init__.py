"""Our own C++ kernels for processors (`csrc/`), chosen where the library was built for this machine."""

from __future__ import annotations

from fastserve.kernels.cpu.kernels import CPUKernels, create

__all__ = ["CPUKernels", "create"]
