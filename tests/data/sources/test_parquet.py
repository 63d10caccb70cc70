"""Parquet files of Hugging Face datasets, read in place and at random."""

import json
import pickle

import numpy as np
import pytest

from tests.data.pictures import encoded
from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, open_source, parquet, parse

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "emu"]


def write(path, numbers, *, labels=None, names=NAMES, column="label", image="image", group=3):
    labels = [n % 3 for n in numbers] if labels is None else labels
    images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
    table = pa.table({image: images, column: labels, "extra": ["x"] * len(images)})
    if names:
        features = {image: {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def test_images_labels_and_splits(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", range(7))
    write(tmp_path / "data" / "train-00001-of-00002.parquet", range(7, 10))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", range(20, 22))
    assert parse(str(tmp_path)) == SourceConfig("parquet", str(tmp_path), "train")
    source = open_source(SourceConfig("parquet", str(tmp_path), "train"))
    assert (len(source), source.num_classes, source.class_names) == (10, 3, ("cat", "dog", "emu"))
    for i in (9, 0, 5, 2, 8, 0, 6):
        assert source[i]["image"] == encoded(i)
        assert source[i]["label"] == i % 3
    assert source.id(8) == f"row 1 of {tmp_path}/data/train-00001-of-00002.parquet"
    assert pickle.loads(pickle.dumps(source))[4]["image"] == encoded(4)
    cut = open_source(SourceConfig("parquet", str(tmp_path), "train[5:8]+test"))
    assert [cut[i]["image"] for i in range(5)] == [encoded(n) for n in (5, 6, 7, 20, 21)]


def test_few_row_groups_are_kept(tmp_path):
    write(tmp_path / "train.parquet", range(20), group=2)
    source = open_source(SourceConfig("parquet", str(tmp_path), "train"))
    assert all(source[i]["image"] == encoded(i) for i in np.random.default_rng(0).permutation(20).tolist())
    assert len(source._kept) == 2


def test_other_columns_names_and_labels(tmp_path):
    write(tmp_path / "a" / "train.parquet", range(4), names=None, column="fine", image="img", labels=list("bbca"))
    source = open_source(SourceConfig("parquet", str(tmp_path / "a"), "train", label="fine"))
    assert (source.class_names, [int(source[i]["label"]) for i in range(4)]) == (("a", "b", "c"), [1, 1, 2, 0])
    write(tmp_path / "b" / "train.parquet", range(3), names=None, labels=[[0], [], [0, 2]], column="labels")
    source = open_source(SourceConfig("parquet", str(tmp_path / "b"), "train"))
    assert source.multi_label
    assert [source[i]["label"].tolist() for i in range(3)] == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    write(tmp_path / "c" / "test.parquet", range(3), labels=[-1, 1, -1])
    assert len(open_source(SourceConfig("parquet", str(tmp_path / "c"), "test"))) == 1


def test_files_that_cannot_be_used_are_explained(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", range(4), column="caption", names=None, labels=list("abcd"))
    config = SourceConfig("parquet", str(tmp_path), "train")
    with pytest.raises(UserError, match=r"train.parquet has no column label, only image, caption, extra"):
        open_source(config)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"train.parquet is no parquet file, or cut off"):
        open_source(config)
    write(tmp_path / "train.parquet", range(4), names=None, labels=[1.5, 2, 3, 4])
    with pytest.raises(UserError, match=r"row 0 of .*train.parquet has the label 1.5"):
        open_source(config)
    write(tmp_path / "train.parquet", range(4))
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match=r"row group 0 of .* bytes, more than 100"):
        open_source(config)
    with pytest.raises(UserError, match="holds no parquet files"):
        open_source(SourceConfig("parquet", str(tmp_path / "nowhere"), "train"))
