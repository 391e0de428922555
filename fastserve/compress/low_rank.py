"""The matrix of a given rank whose outputs are nearest to a matrix's own, on the inputs that it has (weighted SVD).

Of all matrices of rank R the one that projects the outputs onto their R strongest directions changes them least (Eckart
and Young, for W X instead of W), so no inverse of the inputs' moments is needed. N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    """The rank at which two factors hold a share 1 - ratio of the matrix's values."""
    rows, columns = shape
    return max(1, int((1 - ratio) * rows * columns / (rows + columns)))


def factor(weight: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [N, R] and [R, K] for weight [N, K]; moments [K, K]: mean of x x^T of its inputs."""
    matrix = weight.double()
    directions = torch.linalg.eigh(matrix @ moments.double() @ matrix.t()).eigenvectors[:, -rank:]
    return directions.float().contiguous(), (directions.t() @ matrix).float().contiguous()
