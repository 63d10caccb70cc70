"""An own set in one word: which splits are used, and the sizes that follow from its number of images."""

import pytest
from PIL import Image

from configs import finetune, own_images
from vit_scaling import UserError
from vit_scaling.data import own


def images(folder, splits, count=20):
    """Writes `count` images of two classes for each split; "" for no split folder."""
    for number, split in enumerate(splits):
        for index in range(count):
            path = folder / split / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 90 + number + index).save(path)
    return folder


@pytest.mark.parametrize(
    ("splits", "train", "validation", "test"),
    [
        (["train", "val", "test"], "train", "val", "test"),
        (["train", "valid"], "train", "valid", None),
        (["train", "test"], "train", None, "test"),
        (["train"], "train", None, None),
        ([""], "all", None, None),
    ],
)
def test_splits_are_found_or_made(tmp_path, capsys, splits, train, validation, test):
    found = own.find(str(images(tmp_path, splits)))
    assert (found.test and found.test.split) == test
    assert found.num_classes == 2
    told = capsys.readouterr().err
    if validation is None:
        assert (found.train.kind, found.train.split, found.train.parts[0].split) == ("holdout", "train", train)
        assert (found.validation.kind, found.validation.split) == ("holdout", "validation")
        assert found.images == 18
        assert "18 training images of 2 classes, 2 for validation (held out by class, seed 0" in told
    else:
        assert (found.train.split, found.validation.split, found.images) == (train, validation, 20)
        assert f"20 for validation ({validation})" in told


def test_a_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        own.find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("count", "epochs", "batch_size", "steps", "warmup"),
    [
        (7308, 35.03, 256, 1000, 100),  # 365 images for each of 20 steps: 256
        (100_000, 10, 512, 1953, 195),
        (1_281_167, 90, 512, 225_205, 500),
        (100, 50, 8, 625, 62),
        (5, 10, 5, 100, 10),  # fewer images than the least batch; at least 100 steps
    ],
)
def test_sizes_follow_from_the_number_of_images(capsys, count, epochs, batch_size, steps, warmup):
    sizes = own.sizes(count, epochs, most=512)
    assert (sizes.batch_size, sizes.steps, sizes.warmup) == (batch_size, steps, warmup)
    assert f"batch {batch_size}: the largest power of two from 8 to 512" in capsys.readouterr().err


def test_finetune_and_own_images_take_a_folder(tmp_path):
    folder = images(tmp_path, ["train", "val"], 200)
    tuned = finetune.get_config(f"S/16,{folder},res=64")
    assert tuned.data.train.name == tuned.evaluation.validation.name == str(folder)
    assert (tuned.data.batch_size, tuned.duration.amount, tuned.evaluation.test) == (8, 1250, None)  # 50 epochs of 200
    assert tuned.data.transform.size == (64, 64)
    whole = own_images.get_config(f"{folder},model=mu/4,res=32,epochs=4")
    assert (whole.data.train.split, whole.duration.amount, whole.model.patch) == (
        "train",
        100,
        (4, 4),
    )  # 4 epochs of 200, 8 in a step
    assert whole.optim.lr == pytest.approx(1e-3 * (8 / 1024) ** 0.5)
    with pytest.raises(UserError, match="takes no 'size'"):
        own_images.get_config(f"{folder},size=3")
    assert own_images.get_config(f"{folder},epochs=1").duration.amount == 25  # what was asked for, also below 100 steps
    for epochs in ("0", "-3", "nan", "inf"):
        with pytest.raises(UserError, match=f"epochs is {epochs} and must be a positive number"):
            own_images.get_config(f"{folder},epochs={epochs}")
    with pytest.raises(UserError, match="epochs is 'many'; give a positive number"):
        own_images.get_config(f"{folder},epochs=many")


def test_a_weight_path_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no file or folder weights/birds, and as a ViT size: "):
        finetune.get_config("weights/birds,digits")
