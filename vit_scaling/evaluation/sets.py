"""Which images and classes a run is about: compared between its sets, between its processes and between its starts."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vit_scaling import UserError
from vit_scaling.data.sources import Source
from vit_scaling.data.sources.classes import MatchedSource
from vit_scaling.optim.losses import LossConfig

_SAMPLES = 64


def identity(source: Source) -> dict[str, Any]:
    """Returns {"examples", "classes", "names", "ids"} of a set; the last two are hashes.

    Cheap on any set: the names of evenly spaced examples stand for all of them.
    """
    source = source.unmatched if isinstance(source, MatchedSource) else source
    count = len(source)
    indices = sorted({index * max(count - 1, 0) // (_SAMPLES - 1) for index in range(_SAMPLES)}) if count else []
    return {
        "examples": count,
        "classes": source.num_classes,
        "names": _hash(list(source.class_names or ())),
        "ids": _hash([source.id(index) for index in indices]),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def digest(sets: Mapping[str, Any]) -> str:
    """Returns one hash of all the identities."""
    return _hash(dict(sorted(sets.items())))


def check_trainable(source: Source, loss: LossConfig) -> None:
    """Raises UserError for a training set from which this loss can learn nothing."""
    if source.num_classes < 2 and loss.kind == "softmax":
        raise UserError(
            f"data.train has {source.num_classes} class, of which softmax is always sure; give at least two classes, "
            f"or set loss.kind to sigmoid"
        )


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Returns what differs between two identities of one set, or None."""
    if old["examples"] != new["examples"]:
        return f"had {old['examples']} examples and has {new['examples']} now"
    if old["classes"] != new["classes"]:
        return f"had {old['classes']} classes and has {new['classes']} now"
    if old["names"] != new["names"]:
        return "has other class names now"
    if old["ids"] != new["ids"]:
        return "holds other examples, or in another order, now"
    return None
