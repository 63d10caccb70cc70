"""Classes of a model and of a set are matched by name."""

import pytest

from vit_scaling import UserError
from vit_scaling.data.sources.classes import match_classes, parse_class_map

MODEL = ("cat", "dog", "emu")


def test_names_are_matched_whatever_their_order():
    assert match_classes(MODEL, ("emu", "cat", "dog")) == {0: 2, 1: 0, 2: 1}
    assert match_classes(MODEL, ("emu", "dog")) == {0: 2, 1: 1}  # the set lacks a class: the model's numbers stay
    assert match_classes(("caf\u00e9",), ("cafe\u0301",)) == {0: 0}


def test_differing_classes_are_refused_by_name_unless_mapped():
    own = ("dog", "yak", "kitten")
    with pytest.raises(UserError, match=r"lacks 2 \(yak, kitten\) of the set's 3 classes; --class_map=common"):
        match_classes(MODEL, own)
    assert match_classes(MODEL, own, "common") == {0: 1}
    assert match_classes(MODEL, own, {"kitten": "cat"}) == {0: 1, 2: 0}  # yak is left out


@pytest.mark.parametrize(
    ("own", "class_map", "message"),
    [
        (("yak",), "common", "have no class in common: the model has 3"),
        (("cat",), {"cow": "cat"}, "names 'cow', which is no class of the set"),
        (("cat",), {"cat": "cow"}, "names 'cow', which is no class of the model"),
        (("cat", "cat"), None, "the set has the class 'cat' twice"),
        (("cat",), "some", "neither 'common' nor a mapping"),
    ],
)
def test_maps_that_cannot_be_meant_are_refused(own, class_map, message):
    with pytest.raises(UserError, match=message):
        match_classes(MODEL, own, class_map)


def test_the_flag_is_parsed():
    assert parse_class_map("") is None
    assert parse_class_map("common") == "common"
    assert parse_class_map("kitten=cat, puppy = dog") == {"kitten": "cat", "puppy": "dog"}
    for text, message in (("kitten", "has 'kitten'"), ("a=b,=c", "has ''"), ("a=b,a=c", "maps 'a' twice")):
        with pytest.raises(UserError, match=message):
            parse_class_map(text)
