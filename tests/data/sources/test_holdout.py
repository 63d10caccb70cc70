"""A validation split that is made: by class, the same every time, with near-duplicates on one side."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from vit_scaling import UserError
from vit_scaling.data import sources
from vit_scaling.data.prepare.shards import perceptual_hash
from vit_scaling.data.sources import SourceConfig, holdout


class Pictures:
    """Images of noise: number i of class labels[i], drawn from seed looks[i]."""

    class_names, multi_label = None, False

    def __init__(self, labels, looks=None):
        self.labels, self.looks = labels, looks or list(range(len(labels)))
        self.num_classes = max(labels) + 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        small = np.random.default_rng(self.looks[index]).integers(0, 256, (8, 8), dtype=np.uint8)
        image = Image.fromarray(small).resize((64 + index % 3, 64), Image.Resampling.BICUBIC).convert("RGB")
        stream = io.BytesIO()
        image.save(stream, "jpeg", quality=80 + index % 10)
        return {"image": stream.getvalue(), "label": np.int32(self.labels[index])}

    def id(self, index):
        return str(index)


def divided(whole, share=0.1):
    return holdout._divide(whole, share)


def test_every_class_gives_its_share_and_one_image_stays():
    labels = [0] * 40 + [1] * 25 + [2] * 3 + [3]
    train, validation = divided(Pictures(labels))
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert np.bincount(np.array(labels)[validation], minlength=4).tolist() == [4, 2, 1, 0]
    again = divided(Pictures(labels))
    np.testing.assert_array_equal(validation, again[1])
    assert set(validation[:4]) != set(range(4))  # drawn, not the first of each class


def test_near_duplicates_are_on_one_side():
    """Every image is there two or three times, in other sizes and qualities."""
    looks = [number // 2 for number in range(40)] + [100 + number // 3 for number in range(30)]
    whole = Pictures([0] * 40 + [1] * 30, looks)
    hashes = [perceptual_hash(np.asarray(Image.open(io.BytesIO(whole[i]["image"])))) for i in range(70)]
    assert len(set(hashes)) > 30  # they are near, not equal
    train, validation = divided(whole, 0.2)
    assert not {looks[i] for i in train} & {looks[i] for i in validation}
    assert np.bincount(np.array(whole.labels)[validation]).tolist() == [8, 6]


def test_a_group_larger_than_its_share_stays_in_training():
    looks = [0] * 12 + list(range(1, 9))
    _, validation = divided(Pictures([0] * 20, looks), 0.2)
    assert len(validation) == 4
    assert not set(validation) & set(range(12))
    with pytest.raises(UserError, match="of 12 images none can be held out"):
        divided(Pictures([0] * 12, [0] * 12))


def test_groups_join_through_others():
    values = [np.uint64(0), np.uint64(0b1111), np.uint64(0b11111111), None, np.uint64(2**63), np.uint64(2**40 - 1)]
    group = holdout._groups(values)
    assert group[0] == group[1] == group[2] == group[4]  # 4 bits, 4 bits, 1 bit
    assert len({int(group[0]), int(group[3]), int(group[5])}) == 3


def test_a_corrupt_image_keeps_its_class_and_stops_nothing():
    class Damaged(Pictures):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record | ({"image": b"no image"} if index == 5 else {})

    train, validation = divided(Damaged([0] * 10 + [1] * 10), 0.2)
    assert len(train) == 16
    assert len(validation) == 4


def test_the_source_has_two_sides_of_one_set(tmp_path):
    for number in range(20):
        path = tmp_path / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Pictures([0] * 20)[number]["image"])
    whole = SourceConfig("folder", str(tmp_path), "all")

    def side(split):
        return sources.open_source(SourceConfig("holdout", split=split, parts=(whole,), weights=(0.8, 0.2)))

    train, validation = side("train"), side("validation")
    written = dataclasses.asdict(SourceConfig("holdout", split="train", parts=(whole,), weights=(0.8, 0.2)))
    assert (
        len(sources.open_source(SourceConfig.from_json(json.loads(json.dumps(written))))) == 16
    )  # from a run's config.json
    assert (len(train), len(validation)) == (16, 4)
    names = [source.id(index) for source in (train, validation) for index in range(len(source))]
    assert sorted(names) == sorted(str(path) for path in tmp_path.rglob("*.jpg"))
    assert sorted(int(validation[index]["label"]) for index in range(4)) == [0, 0, 1, 1]
    assert train.class_names == ("class0", "class1")
    with pytest.raises(UserError, match="a holdout needs one part"):
        side("test")


def test_large_sets_are_divided_without_reading(monkeypatch):
    monkeypatch.setattr(holdout, "HASHED", 50)
    monkeypatch.setattr(Pictures, "__getitem__", lambda self, index: pytest.fail("read"))
    train, validation = divided(Pictures([0] * 100), 0.1)
    assert (len(train), len(validation)) == (90, 10)
