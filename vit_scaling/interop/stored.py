"""A tensor in a file that has not been read yet."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: known by shape and type, read on demand."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def layer(self, index: int) -> "Stored":
        """Returns one entry of the leading axis."""
        return Stored(self.shape[1:], self.dtype, lambda: self.read()[index])

    def transposed(self) -> "Stored":
        """Returns the transpose of a matrix."""
        return Stored(self.shape[::-1], self.dtype, lambda: self.read().T)
