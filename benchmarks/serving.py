"""Programs for serving on 20 real photographs, against the model: size, and the largest difference of the logits.

    pip install -e ".[serving,benchmark]"
    python benchmarks/serving.py

Each family has a network of its usual size with random weights away from their initial values. The program is written,
read back by JAX or by onnxruntime, and shown uint8 crops of the photographs that scikit-image's wheel holds, at two
batch sizes. Exits 1 where a difference is 1e-4 or larger.
"""

import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import skimage.data
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from vit_scaling import models  # noqa: E402
from vit_scaling.data import mixing  # noqa: E402
from vit_scaling.interop import normalisation, serving  # noqa: E402
from vit_scaling.interop import weights as weights_lib  # noqa: E402
from vit_scaling.models import attention_cnn, resnet, swin, vit  # noqa: E402

LIMIT = 1e-4
STATISTICS = dict(zip(("mean", "std"), normalisation.IMAGENET, strict=True))
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "camera", "coins", "moon")
FAMILIES = (
    ("ViT-S/16", vit.variant("S/16"), (224, 224)),
    ("ViT-B/16, ImageNet statistics", vit.variant("B/16", pool="token", **STATISTICS), (224, 224)),
    ("Swin-T", swin.variant("T", **STATISTICS), (224, 224)),
    ("Swin V2-T", swin.variant("v2-T", **STATISTICS), (256, 256)),
    ("SASA-26", resnet.ResNetConfig(depth=26, spatial="attention", stem="attention"), (224, 224)),
    ("AA-ResNet-26", resnet.ResNetConfig(depth=26, spatial="augmented", groups=(2, 3, 4)), (224, 224)),
    ("attention-CNN, quadratic", attention_cnn.AttentionCNNConfig(), (32, 32)),
    ("attention-CNN, learned", attention_cnn.AttentionCNNConfig(position="learned+content", heads=8), (32, 32)),
)


def photographs(size: tuple[int, int]) -> np.ndarray:
    """Returns 20 photographs, uint8 [20, H, W, 3]: whole ones, then their upper left quarters."""
    whole = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    quarters = [image.crop((0, 0, image.width // 2, image.height // 2)) for image in whole]
    corners = [image.crop((image.width // 2, image.height // 2, image.width, image.height)) for image in whole[:2]]
    shown = (*whole, *quarters, *corners)
    return np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)) for image in shown])


def random_weights(config: models.ModelConfig, size: tuple[int, int]) -> weights_lib.Weights:
    build = jax.jit(
        lambda: models.split(models.build(config, image_size=size, num_classes=1000, key=jax.random.key(0)))[1:]
    )
    generator = np.random.default_rng(0)

    def moved(leaf: jax.Array) -> np.ndarray:
        return np.asarray(leaf) + np.float32(0.02) * generator.standard_normal(leaf.shape, np.float32)

    parameters, statistics = build()
    return weights_lib.of_trees(config, size, jax.tree.map(moved, parameters), jax.tree.map(np.asarray, statistics))


def programs(folder: pathlib.Path, layout: str):
    """Returns the written program as a function, by another library alone."""
    if layout == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return lambda images: session.run(None, {"images": images})[0]
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    held = dict(np.load(folder / "weights.npz"))
    return lambda images: np.asarray(jax.jit(program.call)(held, images))


def main() -> None:
    import jax.export

    wanted = sys.argv[1:]
    worst = 0.0
    for name, config, size in FAMILIES:
        if wanted and not any(word in name for word in wanted):
            continue
        weights, images = random_weights(config, size), photographs(size)
        description, *arrays = models.split(weights.module())
        run = jax.jit(
            lambda arrays, x: models.merge(description, *arrays)(mixing.to_float(x, config.mean, config.std))  # noqa: B023
        )
        expected = np.concatenate([np.asarray(run(arrays, images[i : i + 10])) for i in (0, 10)])
        for layout in serving.LAYOUTS:
            with tempfile.TemporaryDirectory() as parent:
                folder, start = pathlib.Path(parent) / "x", time.perf_counter()
                serving.write(weights, folder, layout=layout, input_type="uint8", texts={})
                took = time.perf_counter() - start
                program = programs(folder, layout)
                actual = np.concatenate([program(images[:13]), program(images[13:])])
                size_mib = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
            difference = float(np.abs(actual - expected).max())
            worst = max(worst, difference)
            print(
                f"{name:30s} {layout:10s} {size_mib:7.1f} MiB  logits up to {np.abs(expected).max():5.2f}, largest "
                f"difference {difference:.1e}, same class {np.mean(actual.argmax(1) == expected.argmax(1)):.0%}, "
                f"written in {took:.0f} s",
                flush=True,
            )
    sys.exit(worst >= LIMIT)


if __name__ == "__main__":
    main()
