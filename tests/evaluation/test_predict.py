"""Prediction: the model's own probabilities for every file, in order, and nothing dropped in silence."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vit_scaling import UserError, interop, models
from vit_scaling.data import mixing
from vit_scaling.data.images import codec
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.evaluation import model, predict
from vit_scaling.evaluation.features import FeatureWriter
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.parallel.mesh import MeshConfig
from vit_scaling.training import initial

ROOT = Path(__file__).parent.parent.parent
COUNT = 19


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    config = tiny.model(pool="gap", drop_path=0.0)
    net = models.build(config, image_size=(28, 28), num_classes=10, key=jax.random.key(3))
    kernel = net.head.kernel  # a fresh head is zero: every probability would be 1/10
    kernel.set_value(jax.random.normal(jax.random.key(4), kernel.get_value().shape))
    interop.save(net, folder, layout="vit_scaling")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images at two depths, one of them corrupt, and things that are no images."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("b", ".hidden", "__MACOSX"):
        (folder / name).mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        image = Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8))
        image.save(folder / ("b" if number % 2 else "") / f"{number:02d}.png")
    (folder / "b" / "03.png").write_bytes((folder / "b" / "05.png").read_bytes()[:200])
    for name in ("notes.txt", ".hidden/a.png", "__MACOSX/a.png", ".a.png"):
        (folder / name).write_bytes((folder / "00.png").read_bytes() if name.endswith("png") else b"hello")
    (folder / "named_wrongly.doc").write_bytes((folder / "00.png").read_bytes())
    return folder


def test_files_folders_and_patterns_are_found(images: Path) -> None:
    found = predict.Found([str(images)])
    names = [os.path.relpath(file, images) for file in found]
    top = [f"{n:02d}.png" for n in range(0, COUNT, 2)]
    assert names == [*top, "named_wrongly.doc", *(f"b/{n:02d}.png" for n in range(1, COUNT, 2))]
    assert found.left_out == 1
    assert list(predict.Found([str(images / "**" / "1?.png")])) == sorted(
        str(images / ("b" if n % 2 else "") / f"{n}.png") for n in range(10, COUNT)
    )
    assert list(predict.Found([str(images / "notes.txt")])) == [str(images / "notes.txt")]  # asked for by name
    with pytest.raises(UserError, match="there is no file, folder or match for 'nowhere'"):
        predict.Found(["nowhere"])
    (images / "__MACOSX" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no images are in .*MACOSX \(1 other files\)"):
        predict.Found([str(images / "__MACOSX")])


def test_predictions_are_the_models_probabilities_in_order(
    weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all eight devices; the last batch is not full, and the files are taken 16 at a time."""
    monkeypatch.setattr(predict, "_CHUNK", 16)
    read = initial.read(weights)
    show = predict.eval_transform(read, crop="resize")
    files = [str(images / ("b" if n % 2 else "") / f"{n:02d}.png") for n in range(COUNT)]
    files.insert(4, str(images / "gone.png"))
    frozen = model.freeze(read, MeshConfig(replica=1, data=8, model=1))
    names = [f"class {n}" for n in range(10)]
    found = list(predict.predict(frozen, iter(files), show, names, top=3, batch_size=8, features=True))
    assert [prediction.file for prediction in found] == files
    assert [p.file for p in found if p.error] == [files[3], files[4]]
    assert "cut off" in str(found[3].error)
    assert found[4].error == "No such file or directory"
    assert not found[3].classes

    good = [prediction for prediction in found if prediction.error is None]
    assert len(good) == COUNT - 1
    pixels = np.stack([codec.decode(Path(p.file).read_bytes()) for p in good])
    description, *arrays = models.split(read.module())
    net = models.merge(description, *arrays)
    logits = np.asarray(jax.jit(lambda x: net(mixing.to_float(x)))(pixels))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for prediction, row in zip(good, probabilities, strict=True):
        assert [likely.index for likely in prediction.classes] == np.argsort(-row)[:3].tolist()
        for likely in prediction.classes:
            assert likely.label == names[likely.index]
            assert likely.probability == pytest.approx(row[likely.index], abs=1e-5)
    features = np.asarray(jax.jit(lambda x: net.features(mixing.to_float(x)))(pixels))
    np.testing.assert_allclose([p.features for p in good], features, atol=1e-4)
    assert len({p.features.tobytes() for p in good if p.features is not None}) == COUNT - 1


def test_sigmoid_probabilities_need_not_sum_to_one() -> None:
    likely = predict._likely(np.array([0.0, 2.0, -1.0]), None, 2, "sigmoid")
    assert [(one.label, one.index) for one in likely] == [("1", 1), ("0", 0)]
    assert [one.probability for one in likely] == pytest.approx([0.880797, 0.5], abs=1e-6)


def test_the_transform_is_the_runs_own_at_the_size_of_the_weights(weights: Path) -> None:
    read = initial.read(weights)
    other = predict.eval_transform(dataclasses.replace(read, normalisation=None))
    assert (other.size, other.crop, other.resize, other.resize_to) == ((28, 28), "central", "area", 32)
    own = {"size": [56, 56], "crop": "square_central", "resize": "antialias", "resize_to": 64, "alpha": "black"}
    run = {"data": {"eval_transform": own}}
    assert predict.eval_transform(read, run) == TransformConfig(
        (28, 28), crop="square_central", resize="antialias", resize_to=32, alpha="black"
    )
    assert predict.eval_transform(read, run, crop="resize", resize_to=None).crop == "resize"
    own |= {"size": [28, 28], "crop": "none"}
    assert predict.eval_transform(read, run).crop == "resize"  # photographs of any size


@pytest.mark.parametrize(
    ("published", "crop", "resize", "resize_to"),
    [
        ({"interpolation": "bicubic", "crop_ratio": 0.9, "crop_mode": "center"}, "central", "bicubic", 31),
        ({"interpolation": "bilinear", "crop_ratio": 1.0, "crop_mode": "squash"}, "resize", "antialias", 28),
        ({"interpolation": "lanczos", "crop_ratio": 0.5}, "central", "lanczos", 56),
        ({"crop_ratio": 0.875, "source": "timm's table of a"}, "central_torchvision", "area", 32),
        ({"crop_ratio": 0.875, "crop_mode": "squash"}, "square_central", "area", 32),
        ({}, "central", "area", 32),
    ],
)
def test_published_weights_are_shown_images_as_their_files_say(
    weights: Path, published: dict, crop: str, resize: str, resize_to: int
) -> None:
    half = (0.5, 0.5, 0.5)
    read = dataclasses.replace(initial.read(weights), normalisation=Normalisation(half, half, **published))
    found = predict.eval_transform(read)
    assert (found.size, found.crop, found.resize, found.resize_to) == ((28, 28), crop, resize, resize_to)


def test_a_crop_that_is_not_implemented_is_refused(weights: Path) -> None:
    half = (0.5, 0.5, 0.5)
    read = dataclasses.replace(initial.read(weights), normalisation=Normalisation(half, half, crop_mode="border"))
    with pytest.raises(UserError, match="crop_mode 'border', which is not implemented; give --crop="):
        predict.eval_transform(read)
    assert predict.eval_transform(read, crop="central").crop == "central"


def test_features_are_written_without_holding_them(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    names = ["a.png", "late\nline.png", "b\udcff.png", "", "\u00e9.png"]
    with FeatureWriter(tmp_path / "new" / "f.npz") as writer:
        for name, row in zip(names, rows, strict=True):
            writer.add(name, row)
    with np.load(tmp_path / "new" / "f.npz") as saved:
        assert saved["files"].tolist() == names
        np.testing.assert_array_equal(saved["features"], rows)
    with pytest.raises(OSError, match="disk"), FeatureWriter(tmp_path / "g.npz") as writer:
        raise OSError("disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # complete or absent


def test_the_command_writes_json_features_and_a_sheet(weights: Path, images: Path, tmp_path: Path) -> None:
    """One corrupt file: it is named, the others are classified, and the exit code is 1."""

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vit_scaling.predict", f"--weights={weights}", *flags]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    features, sheet = tmp_path / "f.npz", tmp_path / "sheet.png"
    done = run(str(images), "--format=json", "--top=2", f"--features={features}", f"--sheet={sheet}")
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == COUNT  # 19 images and the one of another name, without the corrupt one
    for row in rows:
        assert row.keys() == {"file", "predictions"}
        first, second = row["predictions"]
        assert first.keys() == {"label", "index", "probability"}
        assert first["label"] == str(first["index"])
        assert first["probability"] >= second["probability"]
    assert "03.png is corrupt: the png file is cut off" in done.stderr
    assert "1 of 20 files could not be used" in done.stderr
    assert "1 files of the folders are no images" in done.stderr
    with np.load(features) as saved:
        assert saved["files"].tolist() == [row["file"] for row in rows]
        assert saved["features"].shape == (COUNT, 16)
    with Image.open(sheet) as picture:
        assert picture.size == (8 * 136, 3 * 152)

    table = tmp_path / "table.csv"
    done = run(str(images / "00.png"), "--format=csv", "--top=1", f"--output={table}")
    assert (done.returncode, done.stdout) == (0, "")
    with table.open(newline="") as stream:
        header, line = csv.reader(stream)
    assert header == ["file", "rank", "label", "index", "probability"]
    assert line[:2] == [str(images / "00.png"), "1"]
    assert float(line[4]) == pytest.approx(rows[0]["predictions"][0]["probability"], abs=1e-5)
