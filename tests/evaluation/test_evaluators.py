"""Evaluators: every example once, and the ridge protocol by its definition."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.data.sources.classes import MatchedSource, match
from vit_scaling.evaluation import classification, fewshot, model, sets
from vit_scaling.evaluation.suite import Suite
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training.step import Program, build

PLAIN = TransformConfig(size=(28, 28), crop="none")
DATA = tiny.config().data


@pytest.fixture(scope="module")
def program() -> Program:
    config = c.resolve(tiny.config(), 100)
    mesh = mesh_lib.create(c.MeshConfig(data=4), jax.devices()[:4])
    return build(config, num_classes=10, total_steps=8, mesh=mesh)


@pytest.fixture(scope="module")
def params(program: Program) -> Any:
    """Parameters that do not give every digit the same logits."""
    state = program.init()
    state.params["head"]["kernel"] = jax.random.normal(jax.random.key(0), state.params["head"]["kernel"].shape)
    return state.params


def by_hand(program: Program, params: Any, source: Any) -> tuple[float, float, np.ndarray]:
    correct, losses, predictions = [], [], []
    for index in range(len(source)):
        image = np.repeat(np.asarray(source[index]["image"])[None, :, :, None], 3, axis=3)
        batch = {
            "image": np.repeat(image, 4, axis=0),
            "label": np.full(4, source[index]["label"], np.int32),
            "mask": np.ones(4, bool),
        }
        row = jax.device_get(program.classify(params, {}, batch))
        correct.append(row["correct"][0])
        losses.append(row["loss"][0])
        predictions.append(row["prediction"][0])
    return float(np.mean(correct)), float(np.mean(losses)), np.asarray(predictions)


def test_classification_is_exact_over_a_ragged_last_batch(program: Program, params: Any) -> None:
    source = open_source(tiny.digits("validation[:21]"))
    accuracy, loss, predictions = by_hand(program, params, source)
    assert 0 < accuracy < 1
    for batch_size in (4, 8, 16, 32):  # 21 examples leave 1, 5, 5 and 21 in the last one
        found = classification.evaluate(program, params, {}, source, DATA, batch_size=batch_size)
        assert found.accuracy == accuracy
        assert found.loss == pytest.approx(loss, rel=1e-6)
        np.testing.assert_array_equal(found.predictions, predictions)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    """40 digits in nine folders whose names sort otherwise than the digits: eight is class 0."""
    folder, digits = tmp_path_factory.mktemp("named"), open_source(tiny.digits("validation[:40]"))
    for index in range(40):
        file = folder / NAMES[int(digits[index]["label"])] / f"{index:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(digits[index]["image"])).save(file)
    return SourceConfig("folder", str(folder), "all")


def trained(names: tuple[str, ...]) -> MatchedSource:
    """A training set of these classes."""
    return MatchedSource(open_source(tiny.digits("train[:100]")), np.arange(10), names, 10)


def test_a_validation_set_in_another_order_of_classes_is_matched_by_name(
    program: Program, params: Any, named: SourceConfig
) -> None:
    assert open_source(named).class_names == tuple(sorted(NAMES[1:]))  # there is no zero among the 40
    config = tiny.config()
    config.evaluation = dataclasses.replace(config.evaluation, validation=named)
    expected, loss, _ = by_hand(program, params, open_source(tiny.digits("validation[:40]")))
    suite = Suite(config, program)
    before = suite.sets()
    assert suite.measure({"": params}, {}, final=False)["validation/accuracy"] != expected
    suite.match_classes(trained(NAMES))
    assert suite.sets() == before  # the set is the same one
    found = suite.measure({"": params}, {}, final=False)
    assert found["validation/accuracy"] == expected
    assert found["validation/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_validation_set_of_a_class_that_was_not_trained_is_refused(program: Program, named: SourceConfig) -> None:
    config = tiny.config()
    config.evaluation = dataclasses.replace(config.evaluation, validation=named)
    sentence = r"data.train lacks 1 \(one\) of the 9 classes of evaluation.validation; give both the same classes"
    with pytest.raises(UserError, match=sentence):
        Suite(config, program).match_classes(trained(("zero", "first", *NAMES[2:])))


def test_classes_that_a_model_lacks_are_left_out_and_counted(
    program: Program, params: Any, named: SourceConfig
) -> None:
    """The model calls its nines something else; among the common classes the accuracy is that of the digits."""
    digits = open_source(tiny.digits("validation[:40]"))
    labels = np.array([digits[index]["label"] for index in range(40)])
    predictions = by_hand(program, params, digits)[2]
    matched = match(open_source(named), (*NAMES[:9], "ninth"), 10, "common")
    frozen = model.Frozen(params, {}, program)
    numbers = model.on_set(frozen, matched, PLAIN, DATA, 8, "softmax").numbers
    nines = int((labels == 9).sum())
    assert nines
    assert (numbers["examples"], numbers["left_out"], numbers["unmatched"]) == (40 - nines, nines, nines)
    assert numbers["top1"] == pytest.approx((predictions == labels)[labels != 9].mean())
    suite_result = classification.evaluate(program, params, {}, matched, DATA, batch_size=8)
    assert len(suite_result.predictions) == 40
    assert ((suite_result.predictions == -1) == ([matched[i]["label"] < 0 for i in range(40)])).all()


def test_a_batch_that_cannot_be_divided(program: Program, params: Any) -> None:
    source = open_source(tiny.digits("validation[:21]"))
    with pytest.raises(ValueError, match=r"evaluation.batch_size 6 cannot be divided over 4 devices"):
        classification.evaluate(program, params, {}, source, DATA, batch_size=6)


def slow_ridge(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The protocol of Scaling ViT's code base by gradient of the objective: normal equations by eigendecomposition."""
    mean, std = train.mean(0), train.std(0) + 1e-5
    x = np.hstack([(train - mean) / std, np.full((len(train), 1), 100.0)])
    y = np.full((len(train), classes), -1.0)
    y[np.arange(len(train)), labels] = 1.0
    values, vectors = np.linalg.eigh(x.T @ x)
    weights = vectors @ np.diag(1 / (values + l2)) @ vectors.T @ x.T @ y
    return np.hstack([(test - mean) / std, np.full((len(test), 1), 100.0)]) @ weights


@pytest.mark.parametrize(("count", "width"), [(60, 8), (12, 40)])
def test_ridge_is_the_protocol_on_both_sides_of_square(count: int, width: int) -> None:
    generator = np.random.default_rng(0)
    train, test = generator.normal(3.0, 2.0, (count, width)), generator.normal(3.0, 2.0, (30, width))
    labels = generator.integers(0, 4, count)
    classifier = fewshot.ridge(train, labels, num_classes=4, l2=50.0)
    x = np.hstack([(test - classifier.mean) / classifier.std, np.full((30, 1), 100.0)])
    scores = slow_ridge(train, labels, test, 4, 50.0)
    np.testing.assert_allclose(x @ classifier.weights, scores, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(classifier.predict(test), scores.argmax(1))


def test_ridge_finds_classes_that_are_there() -> None:
    generator = np.random.default_rng(1)
    centres = generator.normal(0, 5.0, (5, 16))
    labels = np.repeat(np.arange(5), 10)
    train = centres[labels] + generator.normal(0, 1.0, (50, 16))
    test = centres[labels] + generator.normal(0, 1.0, (50, 16))
    assert np.mean(fewshot.ridge(train, labels, num_classes=5).predict(test) == labels) > 0.95


def test_shots_are_the_same_number_of_each_class_and_nested() -> None:
    labels = np.tile(np.arange(3), 20)
    five = fewshot.choose(labels, 5, seed=0, num_classes=3)
    assert np.bincount(labels[five]).tolist() == [5, 5, 5]
    assert len(set(five)) == 15
    assert set(fewshot.choose(labels, 2, seed=0, num_classes=3)) <= set(five)
    assert set(fewshot.choose(labels, 5, seed=1, num_classes=3)) != set(five)
    with pytest.raises(ValueError, match="wants 21 examples of each class; class 0 has 20"):
        fewshot.choose(labels, 21, seed=0, num_classes=3)


def test_the_evaluator_equals_the_protocol_done_by_hand(program: Program, params: Any) -> None:
    config = c.FewShotConfig(
        train=tiny.digits("train[:200]"), test=tiny.digits("validation[:50]"), transform=PLAIN, shots=(1, 5), seeds=2
    )
    found = fewshot.FewShot(config).evaluate(program, params, {}, DATA, batch_size=8)

    def features(source: Any) -> np.ndarray:
        images = np.stack([np.repeat(np.asarray(source[i]["image"])[:, :, None], 3, 2) for i in range(len(source))])
        return np.concatenate(
            [
                jax.device_get(program.features(params, {}, images[i : i + 2].repeat(2, 0)))[::2]
                for i in range(0, len(images), 2)
            ]
        )

    train, test = open_source(config.train), open_source(config.test)
    train_labels, test_labels = (np.asarray([s[i]["label"] for i in range(len(s))]) for s in (train, test))
    train_features, test_features = features(train), features(test)
    for shots in config.shots:
        accuracies = []
        for seed in range(2):
            generator = np.random.default_rng(seed)
            rows = [generator.permutation(np.flatnonzero(train_labels == k))[:shots] for k in range(10)]
            rows = np.concatenate(rows)
            scores = slow_ridge(train_features[rows].astype(np.float64), train_labels[rows], test_features, 10, 1024.0)
            accuracies.append(np.mean(scores.argmax(1) == test_labels))
        assert found[f"{shots}shot"] == pytest.approx(np.mean(accuracies), abs=0.021)
        assert found[f"{shots}shot_std"] == pytest.approx(np.std(accuracies), abs=0.021)


def test_shots_that_are_not_there(program: Program) -> None:
    config = c.FewShotConfig(
        train=tiny.digits("train[:20]"), test=tiny.digits("validation[:50]"), transform=PLAIN, shots=(10,)
    )
    with pytest.raises(ValueError, match=r"wants 10 examples of each of 10 classes; evaluation\.fewshot\.train has 20"):
        fewshot.FewShot(config)
    random = dataclasses.replace(config, shots=(1,), transform=dataclasses.replace(PLAIN, crop="pad", pad=2))
    with pytest.raises(ValueError, match="evaluation transform cannot be random"):
        fewshot.FewShot(random)


# ---- All of a run's evaluators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [False, True])
def test_the_best_checkpoint_may_be_chosen_by_whatever_is_measured(program: Program, averaged: bool) -> None:
    """And by nothing else: the sentence about a misspelt name lists what `measure` returns before the end."""
    shots = c.FewShotConfig(
        train=tiny.digits("train[:200]"), test=tiny.digits("validation[:10]"), transform=PLAIN, shots=(1, 2), seeds=1
    )
    config = tiny.config(optim=c.OptimConfig(lr=1e-3, ema=0.9 if averaged else None))
    config.evaluation = dataclasses.replace(config.evaluation, fewshot=shots, test=tiny.digits("test[:8]"))
    state = program.init()
    measured = Suite(config, program).measure(
        {"": state.params} | ({"_ema": state.ema} if averaged else {}), state.statistics, final=False
    )
    for name in measured:
        config.checkpoint.best = name
        Suite(config, program)
    for name in ("validation/acuracy", "test/accuracy", *([] if averaged else ["validation_ema/accuracy"])):
        config.checkpoint.best = name
        with pytest.raises(ValueError, match=f"checkpoint.best is '{name}'; evaluations measure") as refusal:
            Suite(config, program)
        assert set(str(refusal.value).partition("measure ")[2].split(", ")) == set(measured)


def test_one_class_cannot_be_trained_with_softmax() -> None:
    """Its loss and its gradient are zero."""
    source = open_source(SourceConfig("builtin", "mnist", "train[:4]"))
    sets.check_trainable(source, c.LossConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "num_classes", 1)
        with pytest.raises(
            UserError, match=r"data.train has 1 class, of which softmax is always sure; give at least two"
        ):
            sets.check_trainable(source, c.LossConfig())
        sets.check_trainable(source, c.LossConfig(kind="sigmoid"))
