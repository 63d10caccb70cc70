"""Published weights become the same network here, and the way back; nothing of a file is trusted."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.golden import fill
from vit_scaling import interop, models, names
from vit_scaling.interop import files, huggingface, normalisation, timm
from vit_scaling.interop.weights import of_module
from vit_scaling.models import adapt, layers, resnet, swin, vit

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "files.json").read_text())
RECORDS = json.loads((GOLDEN / "files_tensors.json").read_text())
LOGITS = np.load(GOLDEN / "files.npz")
VIT = vit.ViTConfig(width=16, depth=2, mlp=24, heads=2, patch=(8, 8), pool="token")
SIZE = (16, 24)


def reference_tensors(name: str) -> dict[str, np.ndarray]:
    return {key: fill.reference_leaf(key, tuple(shape)) for key, shape in RECORDS[name]["tensors"].items()}


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: Any = None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def reference_file(name: str, folder: pathlib.Path) -> pathlib.Path:
    return write(folder, reference_tensors(name), RECORDS[name]["config"])


def outputs(model: Any, images: Any, method: str = "__call__") -> Any:
    description, *arrays = models.split(model)
    run = lambda arrays, images: getattr(models.merge(description, *arrays), method)(images)  # noqa: E731
    return np.asarray(jax.jit(run)(arrays, jnp.asarray(images)))


def make(config: Any, image_size: tuple[int, int] = SIZE, num_classes: int = 5) -> Any:
    """Returns a model filled by the rule of the goldens."""
    build = lambda: models.build(config, image_size=image_size, num_classes=num_classes, key=jax.random.key(0))  # noqa: E731
    description, parameters, statistics = models.split(jax.eval_shape(build))
    filled = jax.tree.map(jnp.asarray, fill.tree(parameters))
    return models.merge(description, filled, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), statistics))


def leaves(model: Any) -> dict[str, np.ndarray]:
    _, parameters, statistics = models.split(model)
    return {path: np.asarray(leaf) for tree in (parameters, statistics) for path, leaf in names.flatten(tree).items()}


def assert_same(one: Any, other: Any) -> None:
    a, b = leaves(one), leaves(other)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


# ---- The networks are the references'


@pytest.mark.parametrize("name", CASES)
def test_files_give_the_references_logits(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    size = tuple(case["image_size"])
    bare = "num_classes" not in case
    wanted_size = size if case.get("interpolate") else None
    model = interop.load(reference_file(name, tmp_path / "file"), image_size=wanted_size)
    assert (model.image_size, type(model).__name__) == (size, "Swin" if "Swin" in name else "ViT")
    actual = outputs(model, fill.images(name, (2, *size, 3)), "features" if bare else "__call__")
    np.testing.assert_allclose(actual, LOGITS[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("library", "rule"), [("hf", "timm"), ("timm", "official")])
def test_the_other_librarys_shift_gives_other_logits(library: str, rule: str, tmp_path: pathlib.Path) -> None:
    """As at 224 x 448, where the last stage is 7 x 14: timm shifts along the long side, transformers does not."""
    name = f"{library} Swin, last stage one window high and two wide"
    model = interop.load(reference_file(name, tmp_path / "file"))
    config = dataclasses.replace(model.config, shift_rule=rule)
    other = models.merge(models.split(make(config, (32, 64)))[0], *models.split(model)[1:])
    actual = outputs(other, fill.images(name, (2, 32, 64, 3)))
    assert np.abs(actual - LOGITS[name]).max() > 1e-3


NEWER = {  # names of modules in transformers 5, beside those of its files
    ".encoder.layer.": ".layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.self.relative": "attention.relative_position_bias.relative",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def replaced(tensors: dict[str, np.ndarray], table: dict[str, str]) -> dict[str, np.ndarray]:
    def rename(name: str) -> str:
        return functools.reduce(lambda name, pair: name.replace(*pair), table.items(), name)

    return {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["hf ViT", "hf Swin, rectangular, padded"])
def test_newer_module_names_of_transformers(name: str, tmp_path: pathlib.Path) -> None:
    tensors = replaced(reference_tensors(name), NEWER)
    assert any("attention.q_proj.weight" in key for key in tensors)
    assert not any("dense" in key for key in tensors)
    newer = interop.load(write(tmp_path / "newer", tensors, RECORDS[name]["config"]))
    assert_same(newer, interop.load(reference_file(name, tmp_path / "older")))


@pytest.mark.parametrize("name", ["timm Swin", "timm Swin V2"])
def test_official_swin_names_and_buffers(name: str, tmp_path: pathlib.Path) -> None:
    """The official file has the merge at the end of its stage, a plain head, and buffers; V2 no word on its window."""
    official = {
        key.replace("head.fc", "head").replace("layers.1.downsample", "layers.0.downsample"): tensor
        for key, tensor in reference_tensors(name).items()
    }
    official["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    official["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    official["layers.0.blocks.0.attn.relative_coords_table"] = np.zeros((1, 7, 7, 2), np.float32)
    config = swin.SwinConfig(version=2 if "V2" in name else 1, width=16, depths=(4, 2), heads=(2, 4), window=4)
    model = interop.load(write(tmp_path / "official", official), config, trained_size=(64, 64))
    same = interop.load(reference_file(name, tmp_path / "timm"))
    assert_same(model, same)
    # The network is that of the golden logits; on whole windows the rules of the shift agree.
    assert (model.config.shift_rule, same.config.shift_rule) == ("official", "timm")
    assert dataclasses.replace(model.config, shift_rule="timm") == same.config


def flax_names(model: Any, style: str) -> dict[str, np.ndarray]:
    """Returns the file that google-research's code would write of this ViT."""
    own, config = leaves(model), model.config
    old = style in ("vision_transformer", "opt/target/")
    numbers = ("1", "2", "3") if old else ("0", "1", "0")
    block = {"attention": f"MultiHeadDotProductAttention_{numbers[0]}", "norm1": "LayerNorm_0"}
    block |= {"norm2": f"LayerNorm_{numbers[1]}", "mlp/up": f"MlpBlock_{numbers[2]}/Dense_0"}
    block |= {"mlp/down": f"MlpBlock_{numbers[2]}/Dense_1"}
    pool = {"pool/attention": "MultiHeadDotProductAttention_0", "pool/norm": "LayerNorm_0", "pool/probe": "probe"}
    pool |= {"pool/mlp/up": "MlpBlock_0/Dense_0", "pool/mlp/down": "MlpBlock_0/Dense_1"}
    result = {}
    for path, leaf in own.items():
        if path.startswith("blocks/"):
            rest = path.removeprefix("blocks/")
            ours = next(part for part in block if rest.startswith(part))
            theirs = rest.replace(ours, block[ours])
            if style == "scan":
                result[f"Transformer/encoderblock/{theirs}"] = leaf
            else:
                result |= {f"Transformer/encoderblock_{i}/{theirs}": leaf[i] for i in range(config.depth)}
        elif path == "position_embedding":
            name = "Transformer/posembed_input/pos_embedding" if old else "pos_embedding"
            zero = [np.full((1, config.width), 0.25, np.float32)] if old and config.pool == "token" else []
            result[name] = np.concatenate([*zero, leaf])[None]
        elif path == "class_token":
            result["cls"] = leaf[None] - (0.25 if old else 0.0)
        elif path.startswith("norm/"):
            result[f"Transformer/encoder_{path}"] = leaf
        elif path.startswith("pool/"):
            ours = next(part for part in pool if path.startswith(part))
            value = leaf[None] if path.endswith("probe") else leaf
            result["MAPHead_0/" + path.replace(ours, pool[ours])] = value
        else:
            result[path] = leaf
    prefix = {"opt/target/": "opt/target/", "params": "params/", "scan": "params/img/"}.get(style, "")
    result = {prefix + name: tensor for name, tensor in result.items()}
    if prefix:
        result["opt/state/step"] = np.zeros((), np.int32)
    return result


@pytest.mark.parametrize(
    ("style", "pool"),
    [("vision_transformer", "token"), ("opt/target/", "token"), ("params", "map"), ("scan", "map"), ("params", "gap")],
)
def test_npz_of_vision_transformer_and_big_vision(style: str, pool: str, tmp_path: pathlib.Path) -> None:
    """Old and new names, prefixes, the row of the class token, MAP heads, stacked layers, pre-logits."""
    config = dataclasses.replace(VIT, pool=pool, pre_logits=style == "vision_transformer")
    model = make(config)
    np.savez(tmp_path / "weights.npz", **flax_names(model, style))
    loaded = interop.load(tmp_path / "weights.npz", trained_size=SIZE)
    assert loaded.config == config
    one, other = leaves(loaded), leaves(model)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], atol=1e-7, err_msg=path)  # the class token was taken apart
        assert path == "class_token" or (leaf == other[path]).all(), path


def test_bfloat16_stored_as_void(tmp_path: pathlib.Path) -> None:
    model = make(dataclasses.replace(VIT, pool="gap"))
    tensors = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in flax_names(model, "params").items()}
    np.savez(tmp_path / "half.npz", **{name: leaf.view(np.dtype("V2")) for name, leaf in tensors.items()})
    loaded = leaves(interop.load(tmp_path / "half.npz", trained_size=SIZE))
    for path, leaf in leaves(model).items():
        np.testing.assert_array_equal(loaded[path], leaf.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=path)
    safetensors.numpy.save_file(tensors, tmp_path / "half.safetensors")
    assert_same(
        interop.load(tmp_path / "half.safetensors", trained_size=SIZE),
        interop.load(tmp_path / "half.npz", trained_size=SIZE),
    )


# ---- The way back

SWIN = swin.SwinConfig(width=8, depths=(4, 2), heads=(1, 2), window=4)
EXPORTS = {
    "token": VIT,
    "gap": dataclasses.replace(VIT, pool="gap", gelu="exact"),
    "map": dataclasses.replace(VIT, pool="map", mlp=25),
    "registers": dataclasses.replace(VIT, registers=3, layerscale=0.1),
    "v1": SWIN,
    "v2": dataclasses.replace(SWIN, version=2, pretrained_windows=(3, 2)),
    "resnet": resnet.ResNetConfig(depth=14, width=8),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [("token", "huggingface"), ("gap", "huggingface"), ("v1", "huggingface"), ("v2", "huggingface")]
    + [(name, "timm") for name in ("token", "gap", "map", "registers", "v1", "v2")]
    + [(name, "vit_scaling") for name in ("map", "v2", "resnet")],
)
def test_round_trips_are_exact(name: str, layout: str, tmp_path: pathlib.Path) -> None:
    size = {"gap": (16, 16), "v1": (32, 48), "v2": (32, 48), "resnet": (32, 32)}.get(name, SIZE)
    config = dataclasses.replace(EXPORTS[name])
    if layout == "timm" and isinstance(config, swin.SwinConfig):
        config.shift_rule = "timm"
    if name in ("token", "map", "registers") and layout != "vit_scaling":
        config.gelu = "exact" if name == "token" else "tanh"
    model = make(config, size)
    interop.save(model, tmp_path / "export", layout=layout)
    again = interop.load(tmp_path / "export")
    assert_same(again, model)
    assert again.image_size == size
    # A layer scale's first value and the rate of drop path are no part of weights.
    plain = {"drop_path": 0.0} if hasattr(config, "drop_path") else {}
    plain |= {"layerscale": 1.0} if getattr(config, "layerscale", None) else {}
    assert dataclasses.replace(again.config, **plain) == dataclasses.replace(config, **plain)


def test_fixed_positions_are_exported_as_a_table(tmp_path: pathlib.Path) -> None:
    model = make(dataclasses.replace(VIT, pool="gap", position="sincos2d"))
    interop.save(model, tmp_path / "export", layout="timm")
    again = interop.load(tmp_path / "export")
    assert again.config.position == "learned"
    expected = layers.sincos2d(SIZE[0] // 8, SIZE[1] // 8, VIT.width)
    np.testing.assert_array_equal(leaves(again).pop("position_embedding"), np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    ("fields", "layout", "sentence"),
    [
        ({"pool": "map"}, "huggingface", "model.pool is 'map', and there it is 'gap'"),
        ({"pool": "gap"}, "huggingface", "has square images; these are 16x24: export in timm's layout"),
        ({"pre_norm": True}, "huggingface", "CLIPVisionModel has no classifier; export the backbone without one"),
        ({"position": "rope", "pool": "gap"}, "timm", "model.position is 'rope'"),
        (
            {"norm_eps": 1e-3},
            "timm",
            r"model.norm_eps 0.001; with its 1e-06 the logits of two images of noise change by up to \d\.\de-\d\d",
        ),
        ({}, "flax", "layout is 'flax'; choose one of huggingface, timm, vit_scaling"),
    ],
)
def test_what_a_layout_cannot_express(fields: Any, layout: str, sentence: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        interop.save(make(dataclasses.replace(VIT, **fields)), tmp_path / "export", layout=layout)
    assert list(tmp_path.iterdir()) == []


# For every field of a ViT another value, and the layouts that can express it.
FIELDS: dict[str, tuple[Any, str]] = {
    "width": (32, "huggingface timm"),
    "depth": (3, "huggingface timm"),
    "mlp": (32, "huggingface timm"),
    "heads": (4, "huggingface timm"),
    "patch": ((8, 4), "timm"),
    "pool": ("max", "timm"),
    "class_token": (True, "timm"),
    "pool_prefix": (True, "timm"),
    "pool_norm": (True, "timm"),
    "position": ("sincos2d", "huggingface timm"),
    "rope": ("vit5", ""),
    "registers": (2, "timm"),
    "layerscale": (0.5, "timm"),
    "layerscale_mlp": (0.25, ""),
    "mlp_kind": ("swiglu", ""),
    "norm": ("rmsnorm", ""),
    "pre_norm": (True, "timm"),
    "qk_norm": (True, ""),
    "qk_norm_bias": (True, ""),
    "parallel": (True, ""),
    "qkv_bias": (False, "timm"),
    "key_bias": (False, ""),
    "proj_bias": (False, "timm"),
    "mlp_bias": (False, ""),
    "norm_bias": (False, ""),
    "pre_logits": (True, ""),
    "gelu": ("quick", "huggingface timm"),
    "norm_eps": (1e-12, "huggingface"),
}


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_every_field_is_carried_or_refused_by_name(layout: str) -> None:
    """A field that is added to ViTConfig must be added here, too."""
    base = dataclasses.replace(VIT, pool="gap", gelu="exact")
    others = {field.name for field in dataclasses.fields(base)} - set(vit.NOT_OF_THE_WEIGHTS)
    assert others == FIELDS.keys()
    library = {"huggingface": huggingface, "timm": timm}[layout]
    known = normalisation.named("half")
    for field, (value, layouts) in FIELDS.items():
        config = dataclasses.replace(base, **{field: value})
        if layout in layouts:
            library.neighbour(config, (16, 16), 5, known, None)
            continue
        with pytest.raises(
            ValueError, match=rf"model\.({field}|layerscale|qk_norm_bias|pool)\b|no classifier"
        ) as error:
            library.neighbour(config, (16, 16), 5, known, None)
        assert field in str(error.value) or field in ("layerscale_mlp", "qk_norm", "layerscale", "pre_norm")


def test_another_epsilon_can_be_accepted(tmp_path: pathlib.Path) -> None:
    weights = of_module(make(dataclasses.replace(VIT, norm_eps=1e-12)))
    interop.write(weights, tmp_path / "export", layout="timm", accept_norm_eps=True)
    assert interop.read(tmp_path / "export").config.norm_eps == 1e-6


def test_a_swin_that_a_library_computes_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    """On 8 x 8 patches timm shifts windows of 3 and then pads; the official code and transformers pad first."""
    odd = dataclasses.replace(SWIN, window=3)
    for layout, rule in (("timm", "official"), ("huggingface", "timm")):
        model = make(dataclasses.replace(odd, shift_rule=rule), (32, 32))
        with pytest.raises(
            ValueError, match=r"shifts the windows of 3 on a grid of 8x8 in another way \(model.shift_rule"
        ):
            interop.save(model, tmp_path / "export", layout=layout)
    # At 224 x 448 the last stage is 7 x 14: one side is a window. Whole windows are the same by both rules.
    config = dataclasses.replace(SWIN, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=7)
    with pytest.raises(ValueError, match="on a grid of 7x14"):
        timm.refuse_rule("timm", config, (224, 448), "timm")
    timm.refuse_rule("timm", config, (224, 224), "timm")
    whole = of_module(make(dataclasses.replace(SWIN, shift_rule="timm"), (32, 32)))
    other = interop.Target(SWIN, image_size=(64, 64))
    assert whole.adapted(other).config.shift_rule == "official"
    with pytest.raises(ValueError, match=r"the weights' model.shift_rule is 'timm', and 'official' is asked for"):
        whole.adapted(dataclasses.replace(other, image_size=(32, 48)))


def test_positions_are_resampled_as_their_library_does(tmp_path: pathlib.Path) -> None:
    """timm antialiases; an import remembers that."""
    weights = interop.read(reference_file("timm ViT", tmp_path / "file"))
    assert weights.antialias
    found = dataclasses.replace(weights, normalisation=normalisation.named("half"))
    interop.write(found, tmp_path / "own", layout="vit_scaling")
    small = interop.read(tmp_path / "own", interop.Target(image_size=(32, 32))).leaves["position_embedding"]
    table = weights.leaves["position_embedding"]
    np.testing.assert_array_equal(small, adapt.resize_positions(table, (3, 3), (2, 2), antialias=True))
    assert np.abs(small - adapt.resize_positions(table, (3, 3), (2, 2))).max() > 0.01
    assert not interop.read(reference_file("hf ViT", tmp_path / "hf")).antialias


def test_nothing_is_half_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(VIT)
    interop.save(model, tmp_path / "export", layout="timm")
    with pytest.raises(ValueError, match="export exists already"):
        interop.save(model, tmp_path / "export", layout="timm")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.json, "dumps", full)
    with pytest.raises(OSError, match="no space"):
        interop.save(model, tmp_path / "other", layout="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# ---- Every tensor is accounted for


def edit(tmp_path: pathlib.Path, change: Callable[[dict[str, np.ndarray]], None]) -> pathlib.Path:
    tensors = reference_tensors("hf ViT")
    change(tensors)
    return write(tmp_path / "edited", tensors, RECORDS["hf ViT"]["config"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("vit.layernorm.bias"), "lack the tensor 'layernorm.bias'"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "no place for the tensor 'extra'"),
        (
            lambda t: t.update({"vit.encoder.layer.1.output.dense.weight": np.zeros((48, 81), np.float32)}),
            r"'encoder.layer.1.output.dense.weight' has the shape \(48, 81\); the model needs \(48, 80\)",
        ),
        (
            lambda t: t.update({"vit.layernorm.bias": np.zeros(48, np.int32)}),
            "'layernorm.bias' is of type i32; weights are float32, float16",
        ),
        (
            lambda t: t.update({"vit.layernorm.bias": np.full(48, np.nan, np.float32)}),
            "'layernorm.bias' holds numbers that are not finite",
        ),
        (
            lambda t: t.update({"vit.encoder.layer.999999999.x": np.zeros(1, np.float32)}),
            "the weights name a layer 999999999",
        ),
        (lambda t: (t.clear(), t.update(a=np.zeros(1))), "names .* are of no known network"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, sentence: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        interop.load(edit(tmp_path, change))


def test_what_may_be_left_over(tmp_path: pathlib.Path) -> None:
    path = edit(tmp_path, lambda tensors: tensors.update({"teacher.x": np.zeros(2, np.float32)}))
    assert interop.load(path, ignore=[r"teacher\..*"]).config.depth == 3
    with pytest.raises(ValueError, match=r"no place for the tensor 'teacher.x'"):
        interop.load(path, ignore=["teacher"])


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: pathlib.Path) -> None:
    for name, field in (("timm Swin V2", "window"), ("hf Swinv2, rectangular, padded", "window"), ("hf ViT", "heads")):
        path = write(tmp_path / field, reference_tensors(name))
        with pytest.raises(ValueError, match=f"tell model.{field}; put their config.json beside them"):
            interop.load(path)
    config = vit.ViTConfig(48, 3, 80, 4, pool="token", norm_eps=1e-12, gelu="exact")
    assert_same(interop.load(path, config), interop.load(reference_file("hf ViT", tmp_path / "told")))


@pytest.mark.parametrize(("layout", "epsilon"), [("hf ViT with pooler, no classifier", 1e-12), ("timm ViT", 1e-6)])
def test_the_epsilon_of_a_file_without_config(layout: str, epsilon: float, tmp_path: pathlib.Path) -> None:
    """transformers' ViT adds 1e-12 to the variance, timm's 1e-6; width 192 has one published number of heads."""
    shapes = {name: list(shape) for name, shape in RECORDS["timm ViT"]["tensors"].items()}
    if layout.startswith("hf"):
        model = make(vit.ViTConfig(192, 1, 8, 3, (8, 8), pool="token", gelu="exact", norm_eps=1e-12), (16, 16))
        interop.save(model, tmp_path / "file", layout="huggingface")
        (tmp_path / "file" / "config.json").unlink()
    else:
        write(tmp_path / "file", {name: fill.reference_leaf(name, tuple(shape)) for name, shape in shapes.items()})
    assert interop.describe(tmp_path / "file" / "model.safetensors")[0].norm_eps == epsilon


def test_a_config_that_contradicts_the_weights(tmp_path: pathlib.Path) -> None:
    path = reference_file("hf ViT", tmp_path / "file")
    with pytest.raises(ValueError, match=r"the weights' model.gelu is 'exact', and 'tanh' is asked for"):
        interop.load(path, vit.ViTConfig(48, 3, 80, 4, pool="token", norm_eps=1e-12))
    model = make(dataclasses.replace(VIT, pool="gap"), (24, 40))
    np.savez(tmp_path / "odd.npz", **flax_names(model, "params"))
    with pytest.raises(ValueError, match="position table of 15 rows is of no square grid; give the trained_size"):
        interop.load(tmp_path / "odd.npz")


# ---- Files that are not what they say


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def npz_member(descr: str, shape: str, data: bytes) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def table_of_names(size: int) -> bytes:
    """A PyTorch archive whose directory says that its pickle has this size; there is no such pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        archive.getinfo("archive/data.pkl").file_size = size
    return buffer.getvalue()


def whole_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **flax_names(make(dataclasses.replace(VIT, pool="gap")), "params"))
    return buffer.getvalue()


def damaged_npz() -> bytes:
    """One byte of an array's data is another one: only its checksum tells."""
    data = bytearray(whole_npz())
    data[data.index(b"embedding/kernel.npy") + 8000] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.safetensors", lambda: b"", "no whole safetensors file"),
        ("a.safetensors", lambda: safetensors.numpy.save({"a": np.zeros(9)})[:-1], "no whole safetensors file"),
        ("a.safetensors", lambda: (2**62).to_bytes(8, "little") + b"{}", "no whole safetensors file"),
        ("a.safetensors", lambda: pickle.dumps(Bomb()), "no whole safetensors file"),
        ("a.npz", lambda: whole_npz()[:-30], "no whole .npz file"),
        ("a.npz", lambda: damaged_npz(), "is damaged"),
        ("a.npz", lambda: pickle.dumps(Bomb()), "no whole .npz file"),
        ("a.npz", lambda: npz(a=npz_member("'|O'", "(1,)", pickle.dumps(Bomb()))), "holds Python objects"),
        ("a.npz", lambda: npz(a=npz_member("__import__('os').mkdir('exploded')", "(1,)", b"")), "no array that can"),
        ("a.npz", lambda: npz(a=npz_member("'<f4'", "(1000000, 1000000)", bytes(8))), "the size of 'a.npy' is not"),
        ("a.npz", lambda: npz(a=npz_member("'<f4'", "(4000000,)", bytes(16_000_000))), "do not compress like that"),
        ("a.npz", lambda: npz(a=b"\x93NUMPY\x01\x00\xff"), "no array that can be read"),
        ("a.pkl", lambda: pickle.dumps(Bomb()), "can run code when it is read"),
        ("a.npy", lambda: b"", "can run code when it is read"),
        ("a.bin", lambda: pickle.dumps(Bomb()), r"torch"),
        # torch would map the compressed bytes into memory and take them for numbers.
        ("a.pth", lambda: npz(data=bytes(10**6)), "holds 'data.npy' compressed, so its tensors cannot be read"),
        ("a.pt", lambda: table_of_names(files.MAX_TABLE + 1), f"its table of names takes {files.MAX_TABLE + 1} bytes"),
        ("a.txt", lambda: b"", "is no weight file"),
        ("config.json", lambda: b"{", "is no weight file"),
    ],
)
def test_files_that_are_refused(
    name: str, content: Any, sentence: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=sentence):
        interop.load(tmp_path / name, trained_size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == [name], "something was executed or written"


def test_a_namespace_in_a_file_is_refused_with_what_to_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's loader of weights alone says it, in colours."""

    def load(*_: Any, **options: Any) -> None:
        assert options["weights_only"]
        raise pickle.UnpicklingError("\x1b[31mUnsupported global:\x1b[0m GLOBAL argparse.Namespace\nwas not allowed")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"add_safe_globals\(\[argparse.Namespace\]\), load it, and save") as refused:
        interop.load(tmp_path / "a.pth")
    assert "says 'Unsupported global: GLOBAL argparse.Namespace was not allowed'" in str(refused.value)


@pytest.mark.parametrize(("raw", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_the_average_in_a_pytorch_file(
    raw: str, average: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Tensor:
        def __init__(self, value: float):
            self.value = np.full(2, value, np.float32)
            self.shape, self.dtype, self.numpy = self.value.shape, "torch.float32", lambda: self.value

    held = {"epoch": 3, raw: {"a": Tensor(1)}, average: {"a": Tensor(2)}}
    fake = types.SimpleNamespace(load=lambda *_, **__: held, Tensor=Tensor, bfloat16="torch.bfloat16")
    monkeypatch.setitem(sys.modules, "torch", fake)
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    for ema, expected in ((False, 1), (True, 2)):
        (stored,) = files._open_torch(path, ema).values()
        np.testing.assert_array_equal(stored.read(), np.full(2, expected))
    assert f"also holds an average of its parameters ({average}); --ema takes it" in caplog.text
    del held[average]
    with pytest.raises(ValueError, match="holds no average of its parameters"):
        files._open_torch(path, True)


def test_oversize_tensors_are_refused_by_their_shape_alone(tmp_path: pathlib.Path) -> None:
    """A kernel of 4 TB would be made by reading it; a sparse file costs nothing and shows that nobody did."""
    shapes = {name: leaf.shape for name, leaf in flax_names(make(dataclasses.replace(VIT, pool="gap")), "").items()}
    shapes["Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"] = (2**20, 2**20)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(
        ValueError, match=r"Dense_0/kernel' has the shape \(1048576, 1048576\); the model needs \(16, 24"
    ):
        interop.load(tmp_path / "big.safetensors", trained_size=SIZE)


def test_folders(tmp_path: pathlib.Path) -> None:
    """Shards with an index; a folder without weights, an index that leads elsewhere, a config that is no JSON."""
    tensors = list(reference_tensors("hf ViT").items())
    folder = write(tmp_path / "shards", {}, RECORDS["hf ViT"]["config"])
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": dict(tensors[:20]), "two.safetensors": dict(tensors[20:])}
    for name, part in parts.items():
        safetensors.numpy.save_file(part, folder / name)
    index = {key: name for name, part in parts.items() for key in part}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": index}))
    assert_same(interop.load(folder), interop.load(reference_file("hf ViT", tmp_path / "whole")))
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"a": "../whole/model.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file '../whole/model.safetensors', which is not in"):
        interop.load(folder)
    (tmp_path / "whole" / "config.json").write_text("{'a'")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        interop.load(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold one weight file .*; it holds none"):
        interop.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no weight file or folder"):
        interop.load(tmp_path / "absent")


# ---- What travels with the weights


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def processed(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Returns the folder of "hf ViT" with a preprocessor_config.json beside it."""
    reference_file("hf ViT", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


def test_the_normalisation_is_read_from_the_preprocessor(tmp_path: pathlib.Path) -> None:
    crop = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    weights = interop.read(processed(tmp_path / "a", **IMAGENET, resample=3, **crop))
    found = weights.known_normalisation()
    assert (found.mean, found.std) == normalisation.IMAGENET
    assert (weights.config.mean, weights.config.std) == normalisation.IMAGENET
    assert (found.interpolation, found.crop_ratio, found.crop_mode) == ("bicubic", 0.875, "center")
    assert found.input_size == (224, 224)
    squashed = interop.read(processed(tmp_path / "b", **IMAGENET, size={"height": 64, "width": 64}))
    assert squashed.known_normalisation().crop_mode == "squash"
    assert interop.describe(tmp_path / "a")[0].mean == normalisation.IMAGENET[0]


def test_an_unknown_normalisation_is_asked_for(tmp_path: pathlib.Path) -> None:
    weights = interop.read(reference_file("hf ViT", tmp_path / "file"))
    assert weights.normalisation is None
    for layout in ("huggingface", "timm", "vit_scaling"):
        with pytest.raises(ValueError, match="which mean and std their images have; say it with"):
            interop.write(weights, tmp_path / "export", layout=layout)
    asked = interop.read(tmp_path / "file", interop.Target(normalisation=normalisation.named("clip")))
    assert asked.config.mean == normalisation.CLIP[0]
    with pytest.raises(ValueError, match="choose one of half, imagenet, clip, none"):
        normalisation.named("imagenet21k")
    assert normalisation.named("0.1,0.2,0.3,0.4,0.5,0.6").std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("fields", [{"image_mean": [123.7, 116.3, 103.5], "image_std": [58, 57, 57]}])
def test_a_normalisation_of_other_pixels_is_refused(fields: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="must be three numbers from 0 to 1, of pixels in"):
        interop.read(processed(tmp_path / "a", **fields))
    with pytest.raises(ValueError, match=r"rescale_factor 1\.0; pixels are divided by 255 here"):
        interop.read(processed(tmp_path / "b", **IMAGENET, rescale_factor=1.0))


@pytest.mark.parametrize("layout", ["huggingface", "timm", "vit_scaling"])
def test_exports_carry_pixels_and_names(layout: str, tmp_path: pathlib.Path) -> None:
    """Mean, std, interpolation, crop and the names of the classes survive the way out and in."""
    crop = {"size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
    folder = processed(tmp_path / "file", **IMAGENET, resample=3, **crop)
    config = json.loads((folder / "config.json").read_text())
    names_ = tuple(f"bird {index}" for index in range(7))
    config |= {"id2label": {str(i): name for i, name in enumerate(names_)}, "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    before = interop.read(folder)
    assert before.class_names == names_
    interop.write(before, tmp_path / "export", layout=layout)
    after = interop.read(tmp_path / "export")
    assert after.class_names == names_
    one, other = before.known_normalisation(), after.known_normalisation()
    for field in ("mean", "std", "interpolation", "crop_ratio", "crop_mode"):
        assert getattr(one, field) == getattr(other, field), field
    mapped = before.adapted(interop.Target(class_map=(6, 0)))
    assert mapped.class_names == ("bird 6", "bird 0")


def test_families_without_a_word_on_pixels(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "w.npz", **flax_names(make(dataclasses.replace(VIT, pool="gap"), (16, 16)), "params"))
    assert interop.describe(tmp_path / "w.npz")[0].mean == normalisation.HALF[0]
    swin_ = write(tmp_path / "swin", reference_tensors("timm Swin"))
    assert interop.describe(swin_)[0].mean == normalisation.IMAGENET[0]


# ---- Grids and classes that could be two things


def test_a_square_table_is_resampled_and_not_reshaped(tmp_path: pathlib.Path) -> None:
    """36 rows for images of 4 x 9 patches: the table of the .npz is a square of 6 x 6."""
    model = make(dataclasses.replace(VIT, pool="gap"), (48, 48))
    np.savez(tmp_path / "w.npz", **flax_names(model, "params"))
    table = leaves(model)["position_embedding"]
    loaded = leaves(interop.load(tmp_path / "w.npz", image_size=(32, 72)))["position_embedding"]
    np.testing.assert_array_equal(loaded, adapt.resize_positions(table, (6, 6), (4, 9)))
    assert np.abs(loaded - table).max() > 0.1


def test_a_row_that_may_be_the_class_tokens_is_asked_for(tmp_path: pathlib.Path) -> None:
    """225 rows are 15 x 15 patches, or 16 x 14 and the class token."""
    model = make(dataclasses.replace(VIT, gelu="exact"), (128, 112))
    interop.save(model, tmp_path / "file", layout="timm")
    (tmp_path / "file" / "config.json").unlink()
    told = interop.Target(vit.ViTConfig(16, 2, 24, 2, (8, 8), pool="token", gelu="exact"))
    with pytest.raises(ValueError, match=r"225 rows fits more than one grid; give the trained_size"):
        interop.read(tmp_path / "file", told)
    again = interop.load(tmp_path / "file", told.config, trained_size=(128, 112))
    assert_same(again, model)


def test_class_counts_are_checked(tmp_path: pathlib.Path) -> None:
    path = reference_file("hf ViT", tmp_path / "file")
    for target, sentence in (({"num_classes": 0}, "num_classes is 0"), ({"class_map": ()}, "the class map is empty")):
        with pytest.raises(ValueError, match=sentence):
            interop.load(path, **target)


def test_other_kinds_of_hugging_face_are_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "deit", reference_tensors("hf ViT"), {"model_type": "beit"})
    with pytest.raises(
        ValueError, match=r"config\.json says model_type 'beit'; of Hugging Face's models vit, deit, vit_mae, dinov2"
    ):
        interop.load(path)


def test_a_pooler_beside_a_classifier_stands_idle(tmp_path: pathlib.Path) -> None:
    extra = {"vit.pooler.dense.weight": np.ones((48, 48), np.float32), "vit.pooler.dense.bias": np.ones(48, np.float32)}
    both = write(tmp_path / "both", reference_tensors("hf ViT") | extra, RECORDS["hf ViT"]["config"])
    assert_same(interop.load(both), interop.load(reference_file("hf ViT", tmp_path / "plain")))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "backbone."])
def test_names_of_wrappers_are_removed(prefix: str, tmp_path: pathlib.Path) -> None:
    wrapped = {prefix + name: tensor for name, tensor in reference_tensors("hf ViT").items()}
    path = write(tmp_path / "wrapped", wrapped, RECORDS["hf ViT"]["config"])
    assert_same(interop.load(path), interop.load(reference_file("hf ViT", tmp_path / "plain")))


def test_safetensors_hold_no_average(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"holds no average of parameters; of weight files only \.pth"):
        interop.load(reference_file("hf ViT", tmp_path / "plain"), ema=True)
