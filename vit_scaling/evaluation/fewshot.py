"""Few-shot accuracy: ridge regression on frozen features (Scaling ViT, section 3.1 and appendix D).

Shapes: N examples, D width, M classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vit_scaling import UserError
from vit_scaling.config import FewShotConfig
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import Source, open_source
from vit_scaling.evaluation.network import Network
from vit_scaling.evaluation.passes import one_pass

# Appended to every feature vector: so large that the bias it makes is hardly regularised.
BIAS_FEATURE = 100.0
STD_FLOOR = 1e-5


class Classifier(NamedTuple):
    """A linear classifier of standardised features, and the bias feature."""

    mean: np.ndarray  # [D]
    std: np.ndarray  # [D]
    weights: np.ndarray  # [D + 1, M], the bias feature last

    def predict(self, features_ND: Float[np.ndarray, "N D"]) -> Int[np.ndarray, "N"]:
        """Returns the most likely class of each row."""
        return np.argmax(_standardise(features_ND, self.mean, self.std) @ self.weights, axis=1)


def _standardise(features_ND: np.ndarray, mean_D: np.ndarray, std_D: np.ndarray) -> np.ndarray:
    x_ND = (features_ND.astype(np.float64) - mean_D) / std_D
    return np.concatenate([x_ND, np.full((len(x_ND), 1), BIAS_FEATURE)], axis=1)


def ridge(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    *,
    num_classes: int,
    l2: float = 1024.0,
) -> Classifier:
    """Fits targets of -1 and +1 by least squares with an L2 penalty, in closed form and float64.

    Features are standardised with the mean and deviation of these examples; a constant feature of 100 gives the bias.

    Args:
        train_features: [N, D].
        train_labels: class of each row.
        num_classes: M.
        l2: the penalty; the paper's is 2^10.
    """
    mean_D = train_features.mean(axis=0, dtype=np.float64)
    std_D = train_features.std(axis=0, dtype=np.float64) + STD_FLOOR
    x_NE = _standardise(train_features, mean_D, std_D)
    y_NM = 2.0 * np.eye(num_classes)[train_labels] - 1.0
    count, width = x_NE.shape
    # The same solution through the smaller of the two Gram matrices: (X'X + l2 I)^-1 X' = X' (XX' + l2 I)^-1.
    if count >= width:
        weights_EM = np.linalg.solve(x_NE.T @ x_NE + l2 * np.eye(width), x_NE.T @ y_NM)
    else:
        weights_EM = x_NE.T @ np.linalg.solve(x_NE @ x_NE.T + l2 * np.eye(count), y_NM)
    return Classifier(mean_D, std_D, weights_EM)


def choose(labels: Int[np.ndarray, "N"], shots: int, seed: int, num_classes: int) -> Int[np.ndarray, "S"]:
    """Returns the indices of `shots` examples of each class: the first of a random order of that class.

    Raises:
        UserError: a class has fewer examples.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise UserError(
                f"few-shot evaluation wants {shots} examples of each class; class {label} has {len(members)}"
            )
        chosen.append(generator.permutation(members)[:shots])
    return np.concatenate(chosen)


class _Subset:
    """Some of a source's records, as a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.num_classes, self.class_names, self.multi_label = source.num_classes, source.class_names, False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def id(self, index: int) -> str:
        return self.source.id(int(self.indices[index]))


class FewShot:
    """The evaluation of one run: which examples are the shots is decided, and their labels read, once.

    Args:
        config: sources, transform, shots, seeds, penalty.

    Raises:
        UserError: labels are multi-hot, or a class has too few examples.
    """

    def __init__(self, config: FewShotConfig):
        train, test = open_source(config.train), open_source(config.test)
        transform(config.transform, train=False)
        if train.multi_label or test.multi_label:
            raise UserError("few-shot evaluation needs one label an image; its sources have several")
        self._config, self._test = config, test
        self._num_classes = max(train.num_classes, test.num_classes)
        labels = np.asarray([train[index]["label"] for index in range(len(train))])
        most = max(config.shots)
        # The first n of an order are the n shots, so one choice per seed serves every n.
        orders = [choose(labels, most, seed, self._num_classes) for seed in range(config.seeds)]
        indices = np.unique(np.concatenate(orders))
        self._train = _Subset(train, indices)
        self._train_labels = labels[indices]
        # [seeds, classes, most]: rows of the features of `self._train`.
        self._rows = np.searchsorted(indices, np.stack(orders)).reshape(config.seeds, self._num_classes, most)
        self._test_labels = np.asarray([test[index]["label"] for index in range(len(test))])

    @property
    def examples(self) -> int:
        """How many images are shots or tested."""
        return len(self._train_labels) + len(self._test_labels)

    @property
    def names(self) -> list[str]:
        """The names of what `evaluate` returns."""
        return [f"{shots}shot{what}" for shots in self._config.shots for what in ("", "_std")]

    def evaluate(
        self,
        network: Network,
        params: Any,
        batch_stats: Any,
        data: DataConfig,
        *,
        batch_size: int,
        before_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Returns {"10shot": mean accuracy over the seeds, "10shot_std": their spread, ...}, as in `names`.

        Every process must call it and gets the same numbers.
        """

        def extract(source: Source) -> np.ndarray:
            batches = one_pass(source, self._config.transform, data, network.mesh, batch_size, before_batch)
            parts = [jax.device_get(network.features(params, batch_stats, batch["image"])) for batch in batches]
            return np.concatenate(parts)[: len(source)]

        train_ND, test_ND = extract(self._train), extract(self._test)
        result = {}
        for shots in self._config.shots:
            accuracies = [self._accuracy(train_ND, rows[:, :shots].reshape(-1), test_ND) for rows in self._rows]
            result[f"{shots}shot"] = float(np.mean(accuracies))
            result[f"{shots}shot_std"] = float(np.std(accuracies))
        return result

    def _accuracy(self, train_ND: np.ndarray, rows: np.ndarray, test_ND: np.ndarray) -> float:
        classifier = ridge(train_ND[rows], self._train_labels[rows], num_classes=self._num_classes, l2=self._config.l2)
        return float(np.mean(classifier.predict(test_ND) == self._test_labels))
