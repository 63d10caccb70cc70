"""Which features of a TFDS data set are its image and its label."""

import numpy as np
import pytest

from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, tfds

features = pytest.importorskip("tensorflow_datasets").features

CLASSES = features.ClassLabel(names=["a", "b"])
REAL = {  # imagenet2012_real's
    "file_name": features.Text(),
    "image": features.Image(),
    "original_label": features.ClassLabel(names=["a", "b"]),
    "real_label": features.Sequence(features.ClassLabel(names=["a", "b"])),
}


def label_of(found: dict, asked: str = "") -> str:
    fitting = [name for name in found if tfds._classes(found[name]) is not None]
    return tfds._choose("label", tfds.LABELS, fitting, found, SourceConfig("tfds", "x"), asked)


def test_the_label_is_the_usual_one_the_only_one_or_the_one_that_is_asked_for():
    assert label_of({"image": features.Image(), "label": CLASSES, "coarse": CLASSES}) == "label"
    assert label_of({"image": features.Image(), "labels": features.Sequence(CLASSES)}) == "labels"
    assert label_of({"image": features.Image(), "species": CLASSES, "id": features.Scalar(np.int64)}) == "species"
    assert label_of(REAL) == "real_label"
    assert label_of(REAL, "original_label") == "original_label"


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        (
            {"fine": CLASSES, "coarse": CLASSES},
            "",
            "has no feature 'label', only fine, .*; choose one of fine, coarse with",
        ),
        (REAL, "file_name", "has no label feature 'file_name'"),
        ({"image": features.Image()}, "", "has no feature 'label', only image$"),
        ({"label": features.Text()}, "", "the feature 'label' of the TFDS data set 'x' is Text"),
    ],
)
def test_a_label_that_cannot_be_chosen_is_explained(found, asked, message):
    with pytest.raises(UserError, match=message):
        label_of(found, asked)


def test_a_sequence_of_classes_is_several_labels():
    assert tfds._classes(REAL["real_label"]) is not REAL["real_label"]
    assert tfds._classes(REAL["original_label"]) is REAL["original_label"]
    assert tfds._classes(REAL["file_name"]) is None
