"""report.html in every workdir: written at each evaluation and at the end, and never the reason why a run ends."""

import json
import logging as std_logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import logging

from vit_scaling import models, names
from vit_scaling.config import Config
from vit_scaling.data.images.transforms import transform
from vit_scaling.evaluation.suite import Suite
from vit_scaling.optim import optimizer
from vit_scaling.pages import page, runs
from vit_scaling.parallel import processes, sharding
from vit_scaling.training import workdir as workdirs

PAGE = "report.html"
MOST_LABELS = 20_000  # images whose labels the table of classes reads
MOST_CLASSES = 1000  # rows of that table
CONFUSIONS = 16
THUMBNAIL = 96  # pixels
MOST_WARNINGS = 100  # different ones that a start keeps
MOST_CHARACTERS = 500  # of a warning


class Reporter:
    """Writes the report of one run. As a context manager it keeps warnings, and notes the error that ended a run.

    Hand it to `training.loop.train`.

    Args:
        workdir: of the run.
        command: the words that repeat the run.
    """

    def __init__(self, workdir: Path, command: Sequence[str]):
        self._workdir = workdir
        self._command = list(command)
        self._labels: tuple[Any, np.ndarray] | None = None
        self._warnings = Warnings()
        self._earlier: list[list[Any]] | None = None  # warnings of the starts before this one

    def __enter__(self) -> "Reporter":
        std_logging.getLogger().addHandler(self._warnings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        std_logging.getLogger().removeHandler(self._warnings)
        if self._earlier is not None and processes.is_first():  # else this start never owned the workdir
            ended = None if error is None else f"{type(error).__name__}: {error}"
            self._safely(lambda: self._note({"ended": ended}))
            self.finish()

    def __call__(self, step: int, suite: Suite, config: Config, program: Any) -> None:
        """Takes what the evaluation of a step knows and writes the report again; the first process alone does."""
        if processes.is_first():
            self._safely(lambda: self._record(step, suite, config, program))
            self.finish()

    def finish(self) -> None:
        """Writes the report from the files of the workdir."""
        if processes.is_first() and (self._workdir / "config.json").exists():
            self._safely(lambda: write(self._workdir))

    def _safely(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            logging.error("the report of %s could not be written (%s); the run goes on", self._workdir, error)
        except Exception:
            logging.exception("the report of %s could not be written; the run goes on", self._workdir)

    def _record(self, step: int, suite: Suite, config: Config, program: Any) -> None:
        self._note(
            {
                "command": self._command,
                "examples": {name: row["examples"] for name, row in suite.sets().items()},
                "parameters": parameter_table(config, program),
                "evaluation": self._evaluation(step, suite, config),
                "ended": None,
            }
        )

    def _note(self, changes: dict[str, Any]) -> None:
        """Writes what has changed, and the warnings so far, to the record of the run."""
        path = self._workdir / runs.RECORD
        record = json.loads(path.read_text()) if path.exists() else {}
        if self._earlier is None:
            self._earlier = record.get("warnings", [])
        changes["warnings"] = [*self._earlier, *self._warnings.rows()]
        workdirs.write_json(path, page.finite(record | changes))

    def _evaluation(self, step: int, suite: Suite, config: Config) -> dict[str, Any] | None:
        if suite.classified is None:
            return None
        source, predictions = suite.classified
        final = step == int(config.duration.amount)
        about = {"step": step, "set": "test" if final and config.evaluation.test is not None else "validation"}
        if source.multi_label:
            return about | {"left_out": "images with several labels have no table of classes"}
        used = np.flatnonzero(predictions >= 0)
        shown = used[:MOST_LABELS]
        if self._labels is None or self._labels[0] is not source:
            self._labels = source, np.array([int(source[int(index)]["label"]) for index in shown])
        prepare = transform(config.data.eval_transform, train=False)
        class_names = source.class_names or tuple(str(label) for label in range(source.num_classes))
        told = classes(
            self._labels[1],
            predictions[shown],
            class_names,
            lambda i: prepare(source[int(shown[i])], None)["image"],
        )
        left_out = f"the first {len(shown):,} of {len(used):,} images" if len(used) > len(shown) else None
        return about | told | {"left_out": left_out}


class Warnings(std_logging.Handler):
    """Keeps what is logged as a warning or worse, each text once with how often it came."""

    def __init__(self) -> None:
        super().__init__(std_logging.WARNING)
        self._found: dict[str, tuple[str, int]] = {}
        self._left_out = 0

    def emit(self, record: std_logging.LogRecord) -> None:
        text = record.getMessage()[:MOST_CHARACTERS]
        if text not in self._found and len(self._found) >= MOST_WARNINGS:
            self._left_out += 1
            return
        level, count = self._found.get(text, (record.levelname.lower(), 0))
        self._found[text] = level, count + 1

    def rows(self) -> list[list[Any]]:
        """Returns [level, text, how often] of each; the last row counts those that were too many to keep."""
        rows: list[list[Any]] = [[level, text, count] for text, (level, count) in self._found.items()]
        more = f"further warnings, after the first {MOST_WARNINGS} different ones"
        return [*rows, ["warning", more, self._left_out]] if self._left_out else rows


def classes(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], image_of: Any) -> dict[str, Any]:
    """Returns what the table of classes and the pictures of confusions show.

    Args:
        labels, predictions: class indices, [N].
        class_names: of all classes.
        image_of: index of an example to its uint8 image.
    """
    total = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels[labels == predictions], minlength=len(class_names))
    called = np.bincount(predictions, minlength=len(class_names))
    seen = np.flatnonzero(total)
    worst = seen[np.argsort(right[seen] / total[seen], kind="stable")][:MOST_CLASSES]
    wrong = np.flatnonzero(labels != predictions)
    pairs, first, counts = (
        np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_index=True, return_counts=True)
        if len(wrong)
        else (np.zeros((0, 2), int), np.zeros(0, int), np.zeros(0, int))
    )
    order = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    return {
        "images": len(labels),
        "wrong": len(wrong),
        "classes": [
            [class_names[i], int(total[i]), int(right[i]), float(right[i] / total[i]), int(called[i])] for i in worst
        ],
        "classes_left_out": len(seen) - len(worst),
        "pairs": len(counts),
        "confusions": [
            {
                "label": class_names[pairs[i][0]],
                "prediction": class_names[pairs[i][1]],
                "count": int(counts[i]),
                "image": page.picture(thumbnail(image_of(int(wrong[first[i]])), THUMBNAIL)),
            }
            for i in order
        ],
    }


def thumbnail(image: np.ndarray, most: int) -> np.ndarray:
    """Returns a uint8 image whose longer side is at most `most` pixels."""
    factor = most / max(image.shape[:2])
    if factor >= 1:
        return image
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def parameter_table(config: Config, program: Any) -> list[list[Any]]:
    """Returns a row for each parameter: path, shape, count, decay, learning-rate scale, mesh axes, bytes per device."""
    params = program.state_shape.params
    rules = {row.path: row for row in optimizer.describe(config.optim, params, models.width_ratio(config.model))}
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in names.flatten(params).items()}
    table = []
    for row in sharding.describe(params, program.mesh):
        rule = rules[row.path]
        rate = "-".join(f"{value:.3g}" for value in sorted(set(rule.rates)))
        decay = "frozen" if rule.frozen else f"{rule.decay:g}"
        table.append(
            [row.path, " x ".join(map(str, row.shape)), sizes[row.path], decay, rate, row.split, row.bytes_per_device]
        )
    return table


def write(workdir: Path) -> Path:
    """Writes workdir/report.html from the files of the workdir, whole or not at all, and returns its path."""
    run = runs.read(workdir)
    path = workdir / PAGE
    page.write(path, page.page(f"{workdir.name}: report", ("curves.js", "run.js"), run.data, run.arrays))
    return path


def compare(workdirs_: Sequence[Path], path: Path) -> None:
    """Writes a page that compares runs.

    Raises:
        UserError: a folder holds no run.
    """
    found = [runs.read(workdir, prefix=f"{number}/") for number, workdir in enumerate(workdirs_)]
    titles = distinct([run.data["workdir"] for run in found])
    fields = {name for run in found for name, _ in run.data["config"]}
    configs = [dict(run.data["config"]) for run in found]
    differing = sorted(name for name in fields if len({config.get(name) for config in configs}) > 1)
    data = {
        "runs": [run.data | {"title": title} for run, title in zip(found, titles, strict=True)],
        "differing": [[name, *(config.get(name, "–") for config in configs)] for name in differing],
        "command": " ".join(sys.argv[1:]),
    }
    arrays = {name: array for run in found for name, array in run.arrays.items()}
    title = "comparison of " + ", ".join(titles)
    page.write(path, page.page(title, ("curves.js", "compare.js"), data, arrays))


def distinct(folders: Sequence[str]) -> list[str]:
    """Returns the shortest endings of the paths, in whole parts, that tell them apart."""
    parts = [Path(folder).parts for folder in folders]
    for count in range(1, max(map(len, parts), default=1) + 1):
        titles = ["/".join(path[-count:]) for path in parts]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{number + 1}: {folder}" for number, folder in enumerate(folders)]
