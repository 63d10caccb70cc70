"""The photograph that the tests of decoding and of transforms share."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A photograph that a wheel ships, 301 x 403."""
    from sklearn.datasets import load_sample_images

    return np.ascontiguousarray(load_sample_images().images[1][60:361, 100:503])
