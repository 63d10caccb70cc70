"""What is said of weights: numbers that can be counted by hand, a card, and the commands on files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.interop.test_interop import make
from vit_scaling import interop, models
from vit_scaling.config import MeshConfig
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.evaluation import figure, model
from vit_scaling.evaluation.report import report
from vit_scaling.interop import card
from vit_scaling.interop.weights import of_module
from vit_scaling.models import vit
from vit_scaling.optim import losses
from vit_scaling.training import initial

ROOT = Path(__file__).parents[2]


def one_hot_logits(predictions: list[int], classes: int, confidence: float) -> np.ndarray:
    """Logits whose softmax gives the prediction this confidence and shares the rest."""
    rest = (1 - confidence) / (classes - 1)
    rows = np.full((len(predictions), classes), np.log(rest))
    rows[np.arange(len(predictions)), predictions] = np.log(confidence)
    return rows


def test_accuracies_and_confusions_by_hand() -> None:
    logits = one_hot_logits([0, 0, 1, 2, 6, 6], 7, 0.5)
    logits[3, 5] += 1e-3  # so that of the others class 5 comes next
    logits[4, 0] -= 1e-3  # and there class 0 is the sixth
    logits[4, 5] -= 2e-3
    found = report(logits, np.array([0, 1, 1, 5, 0, 6]), loss="softmax")
    assert found.numbers["top1"] == pytest.approx(3 / 6)
    assert found.numbers["top5"] == pytest.approx(5 / 6)
    assert found.numbers["mean_class_accuracy"] == pytest.approx(np.mean([1 / 2, 1 / 2, 0, 1]))
    assert found.confusion[1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert found.confusion[5].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert (found.numbers["examples"], found.numbers["left_out"]) == (6, 0)


def test_loss_is_that_of_training() -> None:
    logits = np.random.default_rng(0).normal(size=(9, 5))
    labels = np.arange(9) % 5
    for kind in ("softmax", "sigmoid"):
        expected = losses.loss(losses.LossConfig(kind), jnp.asarray(logits, jnp.float32), jnp.eye(5)[labels])
        assert report(logits, labels, loss=kind).numbers["loss"] == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_calibration_by_hand() -> None:
    """Ten at 0.9 of which eight are right, ten at 0.5 of which nine: (0.1 + 0.4) / 2."""
    logits = np.concatenate([one_hot_logits([0] * 10, 3, 0.9), one_hot_logits([0] * 10, 3, 0.5)])
    labels = np.array([0] * 8 + [1] * 2 + [0] * 9 + [1])
    found = report(logits, labels, loss="softmax")
    assert found.numbers["calibration_error"] == pytest.approx(0.25)
    assert [(round(row["confidence"], 6), row["accuracy"], row["share"]) for row in found.bins] == [
        (0.5, 0.9, 0.5),
        (0.9, 0.8, 0.5),
    ]
    # A confidence of exactly 1 is in the last bin.
    assert report(np.array([[1000.0, 0.0, 0.0]]), np.array([1]), loss="softmax").numbers["calibration_error"] == 1
    sure = report(np.array([[2.0, -3.0]]), np.array([0]), loss="sigmoid")
    assert sure.bins[0]["confidence"] == pytest.approx(1 / (1 + np.exp(-2)))


def test_several_labels_an_image() -> None:
    """Right if it is one of them; images without any are left out (ReaL)."""
    labels = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]], np.float32)
    found = report(one_hot_logits([1, 0, 2, 0], 3, 0.8), labels, loss="softmax")
    assert (found.numbers["top1"], found.numbers["examples"], found.numbers["left_out"]) == (2 / 3, 3, 1)
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.array([0, 3]), "a label is 3, and the model has the classes 0 to 2"),
        (np.ones((2, 4), np.float32), "the labels are of 4 classes, the model has 3"),
        (np.zeros((2, 3), np.float32), "no image of the set has a label"),
    ],
)
def test_labels_that_are_not_the_models(labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        report(np.zeros((2, 3)), labels, loss="softmax")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    interop.save(make(tiny.model(pool="token", gelu="exact", drop_path=0.0), (28, 28), 10), folder, layout="timm")
    return folder


def test_a_pass_over_a_set_is_the_models_own_logits(exported: Path) -> None:
    """On all eight devices; the last batch is not full."""
    source, transform = SourceConfig("builtin", "mnist", "test[:37]"), TransformConfig(size=(28, 28), crop="none")
    weights = initial.read(exported)
    mean, std = weights.config.mean, weights.config.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    frozen = model.freeze(weights, MeshConfig(replica=1, data=8, model=1))
    found = model.on_set(frozen, open_source(source), transform, DataConfig(threads=1), 16, "softmax")
    opened = open_source(source)
    images = np.stack([np.repeat(opened[i]["image"][..., None], 3, axis=2) for i in range(37)])
    description, *arrays = models.split(weights.module())
    run = jax.jit(lambda arrays, x: models.merge(description, *arrays)(x))
    logits = np.asarray(run(arrays, ((images / 255 - mean) / std).astype(np.float32)))
    labels = np.array([opened[i]["label"] for i in range(37)])
    expected = report(logits, labels, loss="softmax")
    assert found.numbers == pytest.approx(expected.numbers, abs=1e-5)
    np.testing.assert_array_equal(found.confusion, expected.confusion)
    speed = model.throughput(frozen, weights, 16, 0.0)
    assert speed["images_per_second"] > 0
    assert speed["runs"] == 3


def test_the_picture_of_many_classes_shows_the_worst(tmp_path: Path) -> None:
    """A name is text, whatever it holds; a share of 100% has the first colour of the pages."""
    confusion = np.eye(60, dtype=np.int64) * 10
    confusion[7] = 0
    confusion[7, 8] = 10
    figure.evaluation_figure(
        tmp_path / "picture.png",
        title="sixty classes",
        confusion=confusion,
        names=[f"class {i}" for i in range(7)] + ["$x_{$", "long " * 2000] + [f"class {i}" for i in range(9, 60)],
        bins=[{"confidence": 0.9, "accuracy": 0.5, "share": 1.0}],
    )
    drawn = cv2.imread(str(tmp_path / "picture.png"))
    assert drawn is not None
    blue = [int(figure.COLOURS[0][i : i + 2], 16) for i in (5, 3, 1)]
    assert (drawn == blue).all(axis=-1).sum() > 1000
    assert [figure.short(name) for name in ("a" * 24, "a" * 25)] == ["a" * 24, "a" * 23 + "…"]


def a_run(train: dict[str, Any], start: str) -> dict[str, Any]:
    """What a card reads of a run's config.json."""
    return {
        "config": {
            "data": {"train": train, "batch_size": 64},
            "duration": {"amount": 500, "unit": "steps"},
            "init": {"path": start},
            "optim": {"name": "sgd", "lr": 0.03},
            "schedule": {"kind": "cosine"},
            "loss": {"kind": "softmax"},
            "seed": 3,
        },
        "versions": {"jax": "0.12"},
        "device_count": 4,
        "device_kind": "TPU v4",
    }


def test_the_card_says_where_weights_come_from() -> None:
    weights = of_module(make(vit.ViTConfig(16, 2, 32, 2, (14, 14)), (28, 42), 10))
    plain = card.card(weights, layout="timm", source="x.npz", command=["python", "-m", "vit_scaling.weights"])
    for text in ("28 x 42 pixels", "| classes | 10 |", "from `x.npz`", "local-dir:", "Not recorded", "python -m vit"):
        assert text in plain
    train = {"kind": "tfds", "name": "cifar10", "split": "train[:98%]"}
    run = a_run(train, "/home/me/weights/b16") | {"git_revision": "abc"}
    first = {key: run[key] for key in ("versions", "device_count", "device_kind")} | {"step": 0}
    starts = [first, {"step": 1200, "versions": {"jax": "0.13"}, "device_count": 8, "device_kind": "TPU v5 lite"}]
    known = {"run": run, "metrics": {"test/accuracy": 0.98765}, "starts": starts}
    told = card.card(weights, layout="timm", source="r", command=["c"], **known)
    assert "JAX 0.12, 4 x TPU v4, revision abc.\nContinued from step 1,200 with JAX 0.13, 8 x TPU v5 lite.\n" in told
    assert told.count("Continued") == 1
    for text in ("`cifar10`, split `train[:98%]`, 500 steps of 64 images, starting from `b16`; seed 3", "abc"):
        assert text in told
    assert "| test/accuracy | 0.9877 |" in told


def test_a_card_names_no_folder_of_the_machine() -> None:
    weights = of_module(make(vit.ViTConfig(16, 2, 32, 2, (14, 14)), (28, 42), 10))
    part = {"kind": "array_record", "name": "/home/me/pictures/pets", "split": "train"}
    parts = [part, {"kind": "tfds", "name": "v2/small", "split": "test"}]
    run = a_run({"kind": "mixture", "parts": parts}, "hf://owner/start")
    trained_by = [
        "./run.sh",
        "train",
        "--config=/home/me/configs/finetune.py:$WEIGHTS/b16,/home/me/my pictures/pets",
        "--workdir=~/runs/pets",
        "--config.model=B/16",
    ]
    command = ["python", "-m", "vit_scaling.weights", "push", "--input=../me/runs/pets", "--repo=owner/name"]
    told = card.card(
        weights, layout="timm", source="/home/me/runs/pets", command=command, run=run, trained_by=trained_by
    )
    assert "./run.sh train --config=finetune.py:b16,pets --workdir=pets --config.model=B/16\n" in told
    assert "vit_scaling.weights push --input=pets --repo=owner/name\n" in told
    assert "from `pets`." in told
    assert "starting from `hf://owner/start`" in told
    assert "`array_record` `pets`, split `train` and `tfds` `v2/small`, split `test`" in told
    assert not re.search("me/|home|~", told)


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_from_a_file_to_an_export_and_its_numbers(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3\n0\n9\n")
    written = command(
        "vit_scaling.weights",
        "export",
        f"--input={exported}",
        f"--output={tmp_path / 'hf'}",
        f"--classes={tmp_path / 'classes.txt'}",
        "--image_size=42x28",
    )
    assert written.returncode == 0, written.stderr
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["image_mean"]) == ({"height": 42, "width": 28}, [0.5, 0.5, 0.5])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_size"], config["model_type"], len(config["id2label"])) == ([42, 28], "vit", 3)
    before, after = initial.read(exported), initial.read(tmp_path / "hf")
    np.testing.assert_array_equal(after.parameters["head"]["bias"], before.parameters["head"]["bias"][[3, 0, 9]])
    told = (tmp_path / "hf" / "README.md").read_text()
    assert f"--input={exported.name} --output=hf --classes=classes.txt" in told
    assert str(tmp_path) not in told

    measured = command(
        "vit_scaling.evaluate",
        f"--weights={exported}",
        "--data=builtin:mnist:test[:40]",
        "--crop=none",
        "--batch_size=16",
        "--fewshot=builtin:mnist:train[:200]",
        "--shots=2",
        f"--output={tmp_path / 'report'}",
    )
    assert measured.returncode == 0, measured.stderr
    record = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert {"top1", "top5", "calibration_error", "2shot", "2shot_std"} <= set(record["numbers"])
    assert sum(row["examples"] for row in record["classes"].values()) == np.sum(record["confusion"]) == 40
    assert f"top1 {100 * record['numbers']['top1']:.2f}% (n = 40, 95%: " in measured.stdout
    assert (tmp_path / "report" / "evaluation.png").stat().st_size > 10_000


def test_commands_refuse_in_one_sentence(exported: Path, tmp_path: Path) -> None:
    refused = command("vit_scaling.weights", "export", f"--input={exported}", f"--output={exported}", "--layout=timm")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1] == f"error: {exported} exists already; name a new folder for the weights"
    wrong = command("vit_scaling.weights", "convert", f"--input={exported}")
    assert wrong.stderr.strip() == "error: 'convert' is not a command; choose one of import, export, push, show"
