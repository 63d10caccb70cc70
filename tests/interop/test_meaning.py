"""What weights mean beside their numbers: pixels, classes, probabilities, and whose file it is; and hostile files."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.interop.test_interop import RECORDS, SIZE, VIT, make, reference_file, reference_tensors, write
from vit_scaling import UserError, interop
from vit_scaling.interop import card, imagenet21k, normalisation, picture, timm
from vit_scaling.interop.normalisation import CLIP, IMAGENET, Normalisation
from vit_scaling.interop.weights import Weights, of_module
from vit_scaling.models import resnet, swin

PIXELS = Normalisation(*CLIP, interpolation="bicubic", crop_ratio=0.875)


def weights_of(config: Any, size: tuple[int, int] = SIZE) -> Weights:
    return dataclasses.replace(of_module(make(config, size)), normalisation=PIXELS)


# ---- mean and deviation in the patch kernel


def embedded(weights: Weights, images: np.ndarray) -> np.ndarray:
    """Returns the tokens [B, L, D] of images in [0, 1] with their positions, by sums over each patch."""
    kernel, leaves, found = weights.leaves["embedding/kernel"], weights.leaves, weights.normalisation
    assert found is not None
    rows, columns = kernel.shape[:2]
    B, H, W, _ = images.shape
    x = (images - np.array(found.mean)) / np.array(found.std)
    x = x.reshape(B, H // rows, rows, W // columns, columns, 3)
    tokens = np.einsum("biajcx,acxd->bijd", x, kernel.astype(np.float64)).reshape(B, -1, kernel.shape[-1])
    return tokens + leaves.get("embedding/bias", 0) + leaves.get("position_embedding", 0)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_mean_and_std_are_folded_into_the_patches(pre_norm: bool) -> None:
    """CLIP's patches have no bias: the positions take up the mean."""
    weights = weights_of(dataclasses.replace(VIT, pre_norm=pre_norm))
    assert ("embedding/bias" in weights.leaves) != pre_norm
    folded = weights.folded()
    images = np.random.default_rng(0).uniform(size=(2, *SIZE, 3))
    np.testing.assert_allclose(embedded(folded, images), embedded(weights, images), atol=1e-5)
    assert (folded.config.mean, folded.config.std) == normalisation.NAMED["none"]
    found = folded.known_normalisation()
    assert (found.crop_ratio, found.interpolation) == (0.875, "bicubic")
    assert "folded into the patches: mean 0.4815" in str(found)
    others = {path for path, leaf in weights.leaves.items() if leaf is not folded.leaves[path]}
    assert others == {"embedding/kernel", "position_embedding" if pre_norm else "embedding/bias"}


@pytest.mark.parametrize(
    ("config", "size", "sentence"),
    [
        (
            swin.SwinConfig(width=8, depths=(2,), heads=(1,), window=2),
            (30, 32),
            "SwinConfig for images of 30x32 pixels",
        ),
        (resnet.ResNetConfig(depth=14, width=8), (32, 32), "it pads normalised pixels with zeros"),
        (dataclasses.replace(VIT, pre_norm=True, position="none"), SIZE, "no bias and no learned positions"),
    ],
)
def test_networks_that_pad_are_not_folded(config: Any, size: tuple[int, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        weights_of(config, size).folded()


# ---- classes and probabilities


def test_numberings_of_imagenet21k_are_told_apart() -> None:
    """ImageNet-1k's first and last class are 359 and 21815 in WordNet's order, two further at the end in Google's."""
    swins, googles, focals = ((359, *range(1, 999), last) for last in (21815, 21817, 999))
    for class_map, classes in ((swins, 21841), (googles, 21843), (range(1000), 21842), (focals, 21841), (swins, 1000)):
        imagenet21k.check_map(class_map, classes)
    for class_map, classes, named in (
        (swins, 21843, "21,841 classes, and the weights have 21,843"),
        (googles, 21841, "21,843 classes, and the weights have 21,841"),
        (swins, 21842, "and the weights have 21,842"),
        (range(1000), 21841, "21,842 classes, and the weights have 21,841"),
    ):
        with pytest.raises(UserError, match=named):
            imagenet21k.check_map(class_map, classes)


def test_class_maps_and_pictures_know_imagenet21k() -> None:
    weights = of_module(make(VIT))
    head = {"head/kernel": np.zeros((16, 21843), np.float32), "head/bias": np.zeros(21843, np.float32)}
    large = dataclasses.replace(weights, num_classes=21843, leaves=weights.leaves | head)
    with pytest.raises(UserError, match="it would pick other classes"):
        large.adapted(interop.Target(class_map=(359, *range(998), 21815)))
    assert "21,843 classes" in picture.picture(large)
    assert "ImageNet-21k as Google numbers it" in picture.picture(large)
    text = card.card(large, layout="huggingface", source="x", command=["c"])
    assert "| classes | 21,843, ImageNet-21k as Google" in text
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n")


def test_the_loss_travels(tmp_path: pathlib.Path) -> None:
    """transformers' pipeline takes the sigmoid where problem_type says so, or of one class."""
    config = RECORDS["hf ViT"]["config"] | {"problem_type": "multi_label_classification"}
    found = interop.read(
        write(tmp_path / "hf", reference_tensors("hf ViT"), config),
        interop.Target(normalisation=normalisation.named("half")),
    )
    assert found.loss == "sigmoid"
    for layout in ("huggingface", "vit_scaling"):
        interop.write(found, tmp_path / layout, layout=layout)
        assert interop.read(tmp_path / layout).loss == "sigmoid"
    assert interop.read(reference_file("hf ViT", tmp_path / "plain")).loss == "softmax"
    one = interop.read(tmp_path / "plain", interop.Target(num_classes=1))
    assert (one.loss, one.num_classes) == ("sigmoid", 1)


# ---- whose file


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (("pos_embed", "decoder_embed.weight", "mask_token"), "mae"),
        (("backbone.mask_token",), "dino"),
        (("teacher.backbone.pos_embed", "student.module.backbone.pos_embed"), "dino"),
        (("blocks.0.gamma_1", "blocks.0.attn.qkv.bias"), "deit"),
        (("module.head_dist.weight",), "deit"),
        (("pos_embed", "blocks.0.ls1.gamma", "my_mask_token"), None),
    ],
)
def test_names_tell_whose_pixels(names: tuple[str, ...], whose: str | None) -> None:
    expected = None if whose is None else normalisation.family(whose)
    assert timm.pixels(names) == expected


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (
            {"beit.encoder.layer.0.lambda_1": (8,), "beit.embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4)},
            "BEiT",
        ),
        (
            {"blocks.0.attn.q_bias": (8,), "blocks.0.gamma_1": (8,), "patch_embed.proj.weight": (8, 3, 4, 4)},
            "BEiT; models here do not have that",
        ),
        ({"embeddings.patch_embedding.weight": (8, 48)}, "SigLIP 2 NaFlex, with images of any aspect ratio"),
    ],
)
def test_networks_that_are_not_here_are_named(
    shapes: dict[str, tuple[int, ...]], named: str, tmp_path: pathlib.Path
) -> None:
    """And not by the first tensor that is missing."""
    path = write(tmp_path / "file", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=f"the tensors are those of {named}"):
        interop.read(path)


def test_the_crop_of_a_run_is_exported() -> None:
    """timm divides the size by crop_pct and cuts; squash with a share below 1 is resized to a square and cropped."""
    base = Normalisation(*IMAGENET, source="x")
    own = {"size": [28, 28], "crop": "central", "resize": "antialias", "resize_to": 32}
    found, note = normalisation.of_transform(base, own)
    assert (found.interpolation, found.crop_mode, note) == ("bilinear", "center", None)
    assert normalisation.processor(found, (28, 28))["size"] == {"shortest_edge": 32}
    squared, note = normalisation.of_transform(base, own | {"crop": "square_central", "resize": "area"})
    assert "resizes by 'area', which other libraries do not have" in str(note)
    written = normalisation.processor(squared, (28, 28))
    assert (written["size"], written["crop_size"]) == ({"height": 32, "width": 32}, {"height": 28, "width": 28})
    again = normalisation.from_processor(written)
    assert again is not None
    assert (again.crop_mode, again.crop_ratio) == ("squash", 0.875)
    for size in range(8, 80):
        for larger in range(size, 120):
            fields = own | {"size": [size, size], "resize_to": larger}
            ratio = normalisation.of_transform(base, fields)[0].crop_ratio
            assert int(size / (ratio or 0)) == larger


# ---- hostile files

BOUNDED = """
import resource, sys
from vit_scaling import UserError, interop
with open("/proc/self/status") as file:
    held = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (2**10 * held + 300 * 2**20,) * 2)  # memory, not mapped files
for path in sys.argv[1:]:
    try:
        interop.read(path, interop.Target(trained_size=(48, 48)))
    except UserError as error:
        print(str(error).replace("\\n", " "))
"""


def sparse(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def test_hostile_files_are_refused_in_bounded_memory(tmp_path: pathlib.Path) -> None:
    """Shards that claim 4 GB, an index of many names, an ONNX tensor of 8 GB: one sentence each, below 300 MiB."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shapes = {name: tuple(shape) for name, shape in RECORDS["timm ViT"]["tensors"].items()}
    first, second = dict(list(shapes.items())[:9]), dict(list(shapes.items())[9:])
    second["blocks.1.mlp.fc2.weight"] = (2**15, 2**15)
    sparse(folder / "a.safetensors", first)
    sparse(folder / "b.safetensors", second)
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    many = tmp_path / "many"
    many.mkdir()
    (many / "model.safetensors.index.json").write_text('{"weight_map": {"a": "' + "b" * 17 * 2**20 + '"}}')
    name = b"backbone.embeddings.patch_embeddings.projection.weight"
    with (tmp_path / "x.onnx").open("wb") as file:  # a graph whose one tensor claims 8 GB, which the sparse file has
        tensor = b"\x08" + varint(2**31) + b"\x10\x01" + b"\x42" + varint(len(name)) + name + b"\x4a" + varint(2**33)
        graph = b"\x2a" + varint(len(tensor) + 2**33) + tensor
        file.write(b"\x3a" + varint(len(graph) + 2**33) + graph)
        file.truncate(file.tell() + 2**33)
    words = [sys.executable, "-c", BOUNDED, str(folder), str(many), str(tmp_path / "x.onnx")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert len(found) == 3, found
    assert "'blocks.1.mlp.fc2.weight' has the shape (32768, 32768); the model needs" in found[0]
    assert "is larger than 16 MB; that is no config" in found[1]
    assert "x.onnx" in found[2] or "tensor" in found[2]
