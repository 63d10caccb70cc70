"""Programs that classify pixels without this package: StableHLO for JAX, ONNX for other runtimes.

Both take RGB pixels from 0 to 255, [batch, H, W, 3], of any batch size, and hold the model's own normalisation.
serving.json beside them says shapes, class names, and how far the written program's logits were from the model's.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_scaling
from vit_scaling import UserError, models, names, paths
from vit_scaling.data import mixing
from vit_scaling.interop import files, native, onnx_writing
from vit_scaling.interop.weights import Weights
from vit_scaling.parallel import mesh as mesh_lib

INPUT_TYPES = ("uint8", "float32")
PACKAGES = {"stablehlo": ("flatbuffers",), "onnx": ("onnx", "onnxruntime")}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DESCRIPTION = "serving.json"
# A protocol buffer is smaller than 2 GiB; the tensors of a larger model go into a file of their own.
LARGE = 2**31 - 2**27
# The file is refused where its logits are further from the model's than this share of the largest logit.
TOLERANCE = 1e-3

Logits = Callable[[np.ndarray], np.ndarray]  # of pixels [B, H, W, 3]


def write(weights: Weights, path: str | Path, *, layout: str, input_type: str, texts: Mapping[str, str]) -> None:
    """Writes a folder with the program and serving.json, whole or not at all, once its logits are the model's.

    Args:
        weights: of any model.
        path: the folder, which must not exist or be empty.
        layout: one of LAYOUTS.
        input_type: of the pixels: "uint8", or "float32", which need not be whole numbers.
        texts: further files, by name.

    Raises:
        UserError: the normalisation is unknown, a package is missing, something is in the way, or the layout cannot
            express the network.
    """
    if input_type not in INPUT_TYPES:
        raise UserError(f"input_type is {input_type!r}; choose one of {', '.join(INPUT_TYPES)}")
    require(layout)
    found = weights.known_normalisation()
    config: Any = dataclasses.replace(weights.config, mean=found.mean, std=found.std)
    # Kernels for one kind of device stay out, and ONNX runtimes lack bfloat16 on CPUs.
    if getattr(config, "backend", None) == "pallas":
        config = dataclasses.replace(config, backend="blocks")
    if layout == "onnx":
        config = dataclasses.replace(config, dtype="float32")
    weights = dataclasses.replace(weights, config=config)
    arrays = native.named(weights.leaves, weights.running)
    function = _function(weights)
    with files.new_folder(path) as folder:
        run = LAYOUTS[layout](function, arrays, (*weights.image_size, 3), input_type, folder)
        difference = _difference(run, function, arrays, (*weights.image_size, 3), input_type)
        description = {
            "layout": layout,
            "input": {"name": "images", "type": input_type, "shape": ["batch", *weights.image_size, 3]},
            "pixels": "RGB, from 0 to 255; the program normalises them",
            "output": {"name": "logits", "shape": ["batch", weights.num_classes]},
            "class_names": list(weights.class_names) if weights.class_names else None,
            "largest_difference": difference,
        }
        for name, text in {DESCRIPTION: json.dumps(description, indent=2) + "\n", **texts}.items():
            (folder / name).write_text(text)


def summary(folder: Path) -> str:
    """Returns a sentence with the size of a written program and its difference from the model."""
    difference = json.loads((folder / DESCRIPTION).read_text())["largest_difference"]
    size = sum(map(paths.size, folder.iterdir())) / 2**20
    return f"{size:.1f} MiB; on 3 test images the logits differ from the model's by {difference:.1e} at most"


def _function(weights: Weights) -> Callable[[Mapping[str, Any], Any], Any]:
    """Returns logits(arrays by name, pixels), traced as for one CPU: without kernels of other devices."""
    config, graphdef = weights.config, models.split(weights.abstract())[0]
    cpu = np.array(jax.local_devices(backend="cpu")[:1]).reshape((1,) * len(mesh_lib.AXES))
    mesh = jax.sharding.Mesh(cpu, mesh_lib.AXES)

    def logits(arrays: Mapping[str, Any], images: Any) -> Any:
        parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for name, array in arrays.items():
            parts[name.startswith(native.STATISTICS)][name.removeprefix(native.STATISTICS)] = array
        with mesh_lib.tracing(mesh, config.dtype):
            model = models.merge(graphdef, *map(names.unflatten, parts))
            return model(mixing.to_float(images, config.mean, config.std)).astype(jnp.float32)

    return logits


def _difference(run: Logits, function: Any, arrays: Any, shape: tuple[int, ...], input_type: str) -> float:
    """Returns the largest difference of the written program's logits from the model's, on three images of noise.

    Raises:
        RuntimeError: it is too large, which is a mistake of the export.
    """
    images = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(input_type)
    expected = np.asarray(jax.jit(function)(arrays, images))
    # Two batch sizes: the program must not have learnt one.
    actual = np.concatenate([run(images[:2]), run(images[2:])])
    difference = float(np.abs(actual - expected).max())
    largest = max(float(np.abs(expected).max()), 1.0)
    if not difference <= TOLERANCE * largest:
        raise RuntimeError(f"the written program's logits differ from the model's by {difference}, of {largest}")
    return difference


def require(layout: str) -> None:
    """Raises UserError if a package that a layout needs is not installed; layouts of weights need none."""
    for package in PACKAGES.get(layout, ()):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the layout {layout} needs the package {package}, which is not installed: pip install "
                f"'vit_scaling[serving]'"
            )


def _write_stablehlo(function: Any, arrays: Any, shape: tuple[int, ...], input_type: str, folder: Path) -> Logits:
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), input_type)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    program = export.export(jax.jit(function), platforms=PLATFORMS)(shapes, images)
    (folder / "model.stablehlo").write_bytes(program.serialize())
    np.savez(folder / "weights.npz", **arrays)

    read = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    held = dict(np.load(folder / "weights.npz"))
    return lambda images: np.asarray(jax.jit(read.call)(held, images))


def _write_onnx(function: Any, arrays: Any, shape: tuple[int, ...], input_type: str, folder: Path) -> Logits:
    import onnx
    import onnxruntime

    title = f"vit_scaling {vit_scaling.__version__}"
    held = jax.tree.map(jnp.asarray, arrays)
    try:
        model = onnx_writing.model(lambda images: function(held, images), shape, input_type, title)
    except NotImplementedError as error:
        raise UserError(f"--layout=onnx cannot express this network: {error}; --layout=stablehlo can") from error
    path = folder / "model.onnx"
    large = sum(array.nbytes for array in arrays.values()) > LARGE
    onnx.save_model(model, path, save_as_external_data=large, location="model.onnx.data" if large else None)
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: session.run(None, {"images": images})[0]


LAYOUTS: dict[str, Callable[..., Logits]] = {"stablehlo": _write_stablehlo, "onnx": _write_onnx}
