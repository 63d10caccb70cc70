"""All the evaluators of a run, on the parameters and on their average where there is one."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.config import Config
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import Source, open_source
from vit_scaling.data.sources.classes import match
from vit_scaling.evaluation import classification, sets
from vit_scaling.evaluation.fewshot import FewShot
from vit_scaling.evaluation.network import Network
from vit_scaling.parallel import sharding


class Suite:
    """The evaluators that a config names, their sources opened once.

    Raises:
        UserError: a source or a transform cannot be used, the batch cannot be divided, or no evaluation measures what
            `checkpoint.best` names.
    """

    def __init__(self, config: Config, network: Network):
        self._network = network
        self._batch_size = config.evaluation.batch_size or config.data.batch_size
        self._data = config.data
        sharding.check_batch(self._batch_size, network.mesh, name="evaluation.batch_size")
        transform(self._data.eval_transform, train=False)
        self._sources = {
            name: open_source(source)
            for name, source in (("validation", config.evaluation.validation), ("test", config.evaluation.test))
            if source is not None
        }
        self._fewshot = None if config.evaluation.fewshot is None else FewShot(config.evaluation.fewshot)
        self._pictured: tuple[Source, np.ndarray] | None = None
        names = self._names(averaged=config.optim.ema is not None)
        if config.checkpoint.best not in (None, *names):
            raise UserError(
                f"checkpoint.best is {config.checkpoint.best!r}; evaluations measure {', '.join(names) or 'nothing'}"
            )

    def _names(self, *, averaged: bool) -> list[str]:
        """Returns the names of what `measure` returns before the end."""
        shots = [] if self._fewshot is None else self._fewshot.names
        names = [("validation", name) for name in ("accuracy", "loss") if "validation" in self._sources]
        names += [("fewshot", name) for name in shots]
        return [f"{of}{suffix}/{name}" for suffix in (("", "_ema") if averaged else ("",)) for of, name in names]

    def sets(self) -> dict[str, dict[str, Any]]:
        """Returns the identity of each set by the name of its field in the config; see `sets.identity`."""
        named = {f"evaluation.{name}": source for name, source in self._sources.items()}
        if self._fewshot is not None:
            named |= {f"evaluation.fewshot.{name}": source for name, source in self._fewshot.sources.items()}
        return {name: sets.identity(source) for name, source in named.items()}

    @property
    def counts(self) -> dict[str, int]:
        """The number of examples of each set that is classified, by its name."""
        return {name: len(source) for name, source in self._sources.items()}

    def match_classes(self, train: Source) -> None:
        """Numbers the classes of validation and test set as the training set's, by name.

        Raises:
            UserError: a set has a class that the training set lacks.
        """
        for name, source in self._sources.items():
            owners = "data.train", f"evaluation.{name}"
            self._sources[name] = match(source, train.class_names, train.num_classes, owners=owners)

    def measure(
        self,
        params_by_suffix: Mapping[str, Any],
        batch_stats: Any,
        *,
        final: bool,
        before_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Returns every number by name: "validation/accuracy", "fewshot/10shot", "validation_ema/accuracy", ...

        Args:
            params_by_suffix: parameters to measure, by what is appended to their names: "" and perhaps "_ema".
            batch_stats: running statistics of batch normalization; empty for other models.
            final: measure on the test set too.
            before_batch: called before each batch; what it raises ends the evaluation.
        """
        values: dict[str, float] = {}
        how: dict[str, Any] = {"batch_size": self._batch_size, "before_batch": before_batch}
        for suffix, params in params_by_suffix.items():
            for name, source in self._sources.items():
                if name == "validation" or final:
                    result = classification.evaluate(self._network, params, batch_stats, source, self._data, **how)
                    values[f"{name}{suffix}/accuracy"] = result.accuracy
                    values[f"{name}{suffix}/loss"] = result.loss
                    self._pictured = source, result.predictions
            if self._fewshot is not None:
                scores = self._fewshot.evaluate(self._network, params, batch_stats, self._data, **how)
                values |= {f"fewshot{suffix}/{name}": score for name, score in scores.items()}
        return values

    @property
    def classified(self) -> tuple[Source, np.ndarray] | None:
        """The set that was classified last, and the class predicted for each example in order; -1: left out."""
        return self._pictured

    def examples(self, count: int) -> tuple[list[np.ndarray], list[str], list[str]]:
        """Returns (images uint8 [H, W, 3], labels, predictions) of the first examples that were classified last.

        Empty where nothing was.
        """
        if self._pictured is None or self._pictured[0].multi_label:
            return [], [], []
        source, predictions = self._pictured
        prepare = transform(self._data.eval_transform, train=False)
        shown = np.flatnonzero(predictions >= 0)[:count]
        records = [prepare(source[int(index)], None) for index in shown]
        names = source.class_names or tuple(str(label) for label in range(source.num_classes))
        labels = [names[int(record["label"])] for record in records]
        return [record["image"] for record in records], labels, [names[label] for label in predictions[shown]]
