"""The teacher of a distillation (Beyer et al. 2022, arXiv 2106.05237): weights of any layout, or of a run."""

import dataclasses

from vit_scaling import UserError, interop
from vit_scaling.config import Config
from vit_scaling.data.sources import Source
from vit_scaling.interop import Target, Weights


def read(config: Config, num_classes: int) -> Weights | None:
    """Returns the weights that `loss.teacher` names, for the images and in the dtype of the run; None for no teacher.

    Raises:
        UserError: they cannot be read, have another number of classes, or do not say how they normalise images.
    """
    path = config.loss.teacher
    if path is None:
        return None
    found = interop.read(path, Target(image_size=config.data.transform.size))
    found.known_normalisation()
    if found.num_classes != num_classes:
        raise UserError(f"loss.teacher: {path} has {found.num_classes} classes, and the training set {num_classes}")
    return dataclasses.replace(found, config=dataclasses.replace(found.config, dtype=config.model.dtype))


def check_classes(teacher: Weights | None, source: Source) -> None:
    """Raises UserError where the teacher's classes are known and not those of the training set in their order."""
    if teacher is None or teacher.class_names is None or not source.class_names:
        return
    pairs = enumerate(zip(teacher.class_names, source.class_names, strict=True))
    if differing := next((f"{n} is {a!r} there and {b!r} here" for n, (a, b) in pairs if a != b), None):
        raise UserError(f"loss.teacher has other classes than data.train: class {differing}")
