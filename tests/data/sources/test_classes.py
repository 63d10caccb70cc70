"""Classes of a model and of a set are matched by name."""

import numpy as np
import pytest

from vit_scaling import UserError
from vit_scaling.data.sources import make_label
from vit_scaling.data.sources.classes import UNMATCHED, match, match_classes, parse_class_map

MODEL = ("cat", "dog", "emu")


def test_names_are_matched_whatever_their_order():
    assert match_classes(MODEL, ("emu", "cat", "dog")) == {0: 2, 1: 0, 2: 1}
    assert match_classes(MODEL, ("emu", "dog")) == {0: 2, 1: 1}  # the set lacks a class: the model's numbers stay
    assert match_classes(("caf\u00e9",), ("cafe\u0301",)) == {0: 0}


def test_differing_classes_are_refused_by_name_unless_mapped():
    own = ("dog", "yak", "kitten")
    with pytest.raises(UserError, match=r"lacks 2 \(yak, kitten\) of the 3 classes of the set; --class_map=common"):
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
    for text, message in (("kitten", "has 'kitten'"), ("a=b,=c", "has '=c'"), ("a=b,a=c", "maps 'a' twice")):
        with pytest.raises(UserError, match=message):
            parse_class_map(text)


class _Set:
    """A set in memory: one image for each label, whose pixels are all the label's number."""

    def __init__(self, names, labels, *, multi_label=False):
        self.class_names, self.num_classes, self.multi_label, self._labels = (
            names,
            len(names or range(5)),
            multi_label,
            labels,
        )

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return {"image": np.zeros((2, 2, 3), np.uint8), "label": make_label(self._labels[index], self.num_classes)}

    def id(self, index):
        return f"image {index}"


def test_a_set_takes_the_numbers_of_the_model():
    own = _Set(("emu", "cat", "yak"), [0, 1, 2, -1])
    assert match(own, ("emu", "cat", "yak"), 3) is own
    matched = match(own, MODEL, 3, "common")
    assert [int(matched[i]["label"]) for i in range(4)] == [2, 0, UNMATCHED, -1]
    assert (len(matched), matched.num_classes, matched.class_names, matched.id(1)) == (4, 3, MODEL, "image 1")
    assert matched.left_out == ["yak"]
    several = match(_Set(("emu", "cat", "yak"), [[0, 2], [0, 1], [2]], multi_label=True), MODEL, 3, "common")
    assert [several[i]["label"].tolist() for i in range(3)] == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]


def test_a_map_counts_also_where_the_names_are_the_same():
    swapped = match(_Set(MODEL, [0, 1, 2]), MODEL, 3, {MODEL[0]: MODEL[1], MODEL[1]: MODEL[0]})
    assert [int(swapped[i]["label"]) for i in range(3)] == [1, 0, 2]


def test_classes_without_names_are_matched_by_number():
    own, unnamed = _Set(("x", "y", "z"), [2]), _Set(None, [4])
    assert match(own, MODEL, 3, "number") is own
    assert match(own, None, 3) is own
    for source, count, class_map, message in (
        (unnamed, 7, None, "the set has 5 classes and the model has 7; classes without names are matched by number"),
        (unnamed, 4, "number", "the set has 5 classes and the model has 4"),
        (unnamed, 5, "common", "the set has no names of classes, so no class map but number can be used"),
    ):
        with pytest.raises(UserError, match=message):
            match(source, [str(n) for n in range(count)], count, class_map)
    wider = match(unnamed, None, 7, "number")
    assert (wider.num_classes, int(wider[0]["label"])) == (7, 4)


def test_a_class_map_may_be_a_table(tmp_path):
    table = tmp_path / "map.csv"
    table.write_text('\ufeffkitty,"cat, domestic"\nn02,dog\n\n', "utf-8")
    assert parse_class_map(str(table)) == {"kitty": "cat, domestic", "n02": "dog"}
    table.write_text("kitty,cat,1\n")
    with pytest.raises(UserError, match="has 'kitty=cat=1'; write common, number"):
        parse_class_map(str(table))
    with pytest.raises(UserError, match=r"none\.csv cannot be read as a table"):
        parse_class_map(str(tmp_path / "none.csv"))
