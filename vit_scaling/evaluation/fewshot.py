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
from vit_scaling.data.sources.classes import match
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
    """The evaluation of one run. The first pass over the training set gives its labels, and with them the shots.

    Later passes read the shots alone.

    Args:
        config: sources, transform, shots, seeds, penalty.

    Raises:
        UserError: labels are multi-hot, the test set has a class that the training set lacks, or a class has fewer
            examples than shots.
    """

    def __init__(self, config: FewShotConfig):
        train, test = open_source(config.train), open_source(config.test)
        transform(config.transform, train=False)
        if train.multi_label or test.multi_label:
            raise UserError("few-shot evaluation needs one label for each image; its sources have several")
        owners = "evaluation.fewshot.train", "evaluation.fewshot.test"
        test = match(test, train.class_names, train.num_classes, owners=owners)
        self._config, self._num_classes, self._most = config, train.num_classes, max(config.shots)
        if len(train) < self._num_classes * self._most:
            raise UserError(
                f"few-shot evaluation wants {self._most} examples of each of {self._num_classes} classes; "
                f"evaluation.fewshot.train has {len(train)} examples"
            )
        self.sources: dict[str, Source] = {"train": train, "test": test}
        self._shots: _Subset | None = None

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

        def extract(source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Returns (features, labels, indices) of the examples that could be read."""
            rows = []
            for batch in one_pass(source, self._config.transform, data, network.mesh, batch_size, before_batch):
                features = network.features(params, batch_stats, batch["image"])
                rows.append(jax.device_get((features, *network.replicate((batch["label"], batch["mask"])))))
            features, labels, mask = (np.concatenate(column) for column in zip(*rows, strict=True))
            return features[mask], labels[mask], np.flatnonzero(mask)

        if self._shots is None:
            train_ND, labels, indices = extract(self.sources["train"])
            train_ND, train_labels = (column[self._choose(labels, indices)] for column in (train_ND, labels))
        else:
            train_ND, train_labels, _ = extract(self._shots)
        test_ND, test_labels, _ = extract(self.sources["test"])
        result = {}
        for shots in self._config.shots:
            accuracies = []
            for rows in self._rows:
                chosen = rows[:, :shots].reshape(-1)
                classifier = ridge(
                    train_ND[chosen], train_labels[chosen], num_classes=self._num_classes, l2=self._config.l2
                )
                accuracies.append(float(np.mean(classifier.predict(test_ND) == test_labels)))
            result[f"{shots}shot"] = float(np.mean(accuracies))
            result[f"{shots}shot_std"] = float(np.std(accuracies))
        return result

    def _choose(self, labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Decides which examples are shots; returns their positions in `labels`.

        Args:
            labels: of the training set's readable examples.
            indices: of these in the training set.
        """
        # The first n of an order are the n shots, so one choice per seed serves every n.
        orders = [choose(labels, self._most, seed, self._num_classes) for seed in range(self._config.seeds)]
        kept = np.unique(np.concatenate(orders))
        # [seeds, classes, most]: positions in `kept`.
        self._rows = np.searchsorted(kept, np.stack(orders)).reshape(len(orders), self._num_classes, self._most)
        self._shots = _Subset(self.sources["train"], indices[kept])
        return kept
