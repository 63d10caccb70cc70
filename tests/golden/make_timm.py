"""Records timm's registered vision transformers: what the reader needs to know, and what a test checks it against.

    python -m venv reference
    reference/bin/pip install torch==2.13.0 numpy pillow safetensors pyyaml huggingface_hub
    reference/bin/pip install --no-deps timm==1.0.31
    reference/bin/python tests/golden/make_timm.py

Writes two files. vit_scaling/interop/timm_models.json, {name: [class, arguments, preprocessing]}, holds the arguments
that timm's own definitions give to the four classes this project reads, where they differ from the class's defaults,
and mean, std, interpolation, crop ratio and mode where all weights published under the name agree; of any other class
its name or module alone. tests/golden/timm_models.json.gz holds for each name the tensors' names and shapes (a layer's
number as #, with the layers), the config.json that timm would save, and facts read off the live module.
"""

import functools
import gzip
import inspect
import json
import pathlib
import re
import tempfile

import reference
import torch

timm = reference.timm()
from timm.models import _hub, _registry, deit, swin_transformer, swin_transformer_v2, vision_transformer  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
PACKAGE = FOLDER.parents[1] / "vit_scaling" / "interop"
MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
    *("deit", "beit", "eva", "naflexvit", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"),
    *("cait", "xcit", "hiera", "hieradet_sam2", "vitamin", "twins", "pvt_v2", "levit", "crossvit", "tnt"),
    *("visformer", "volo", "convit"),
)
READ = (
    vision_transformer.VisionTransformer,
    deit.VisionTransformerDistilled,
    swin_transformer.SwinTransformer,
    swin_transformer_v2.SwinTransformerV2,
)
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
given = {}


def record(cls):
    """Makes a class keep the arguments that it is built with."""
    original = cls.__init__

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        if type(self) is cls:
            given.clear()
            given.update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
            given.update(given.pop("kwargs", {}))
        original(self, *args, **kwargs)

    cls.__init__ = wrapper


def plain(value):
    """Returns a value as JSON: a class by its name, a partial with its keywords."""
    if isinstance(value, functools.partial):
        return f"{plain(value.func)}({', '.join(f'{k}={plain(v)}' for k, v in value.keywords.items())})"
    if isinstance(value, type) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return list(value) if isinstance(value, tuple) else value


def arguments(cls):
    defaults = {
        name: value
        for kind in reversed(cls.__mro__)
        if kind in READ
        for name, value in inspect.signature(kind.__init__).parameters.items()
    }
    skipped = ("self", "device", "dtype", "num_classes", "drop_path_rate", "weight_init", "fix_init")
    return {
        name: plain(value)
        for name, value in given.items()
        if name not in skipped and plain(value) != plain(defaults[name].default)
    }


def preprocessing(name):
    """Returns what all weights published under a name agree on, or None where their mean or std differ."""
    default = _registry._model_default_cfgs.get(name)
    configs = [config for config in default.cfgs.values() if config.has_weights] if default else []
    values = [[plain(getattr(config, key)) for key in PREPROCESSING] for config in configs]
    if not values or any(value[:2] != values[0][:2] for value in values):
        return None
    return {
        key: column[0] if len({str(v) for v in column}) == 1 else None
        for key, column in zip(PREPROCESSING, zip(*values, strict=True), strict=True)
    }


def facts(model):
    """Returns what decides the network beyond its shapes, read off the module's parts."""

    def norm(module):
        return f"{type(module).__name__} {module.eps:g}" if hasattr(module, "eps") else type(module).__name__

    def act(module):
        tanh = getattr(module, "approximate", "none") == "tanh" or "Tanh" in type(module).__name__
        return f"{type(module).__name__}{' tanh' if tanh else ''}"

    if isinstance(model, swin_transformer_v2.SwinTransformerV2 | swin_transformer.SwinTransformer):
        blocks = [list(stage.blocks) for stage in model.layers]
        return {
            "windows": [stage[0].window_size[0] for stage in blocks],
            "shifts": [stage[-1].shift_size[0] for stage in blocks],
            "heads": [stage[0].attn.num_heads for stage in blocks],
            "pretrained": [getattr(stage[0].attn, "pretrained_window_size", (0, 0))[0] for stage in blocks],
            "act": act(blocks[0][0].mlp.act),
            "norm": norm(blocks[0][0].norm1),
            "image_size": list(model.patch_embed.img_size),
        }
    block = model.blocks[0]
    if type(block).__name__ != "Block":
        return {"block": type(block).__name__}
    pool = getattr(model, "attn_pool", None)
    return {
        "heads": block.attn.num_heads,
        "pool_heads": getattr(pool, "num_heads", None),
        "block": type(block).__name__,
        "attention": type(block.attn).__name__,
        "mlp": type(block.mlp).__name__,
        "embedding": type(model.patch_embed).__name__,
        "act": act(block.mlp.act) if hasattr(block.mlp, "act") else None,
        "norm": norm(block.norm1),
        "final_norm": norm(model.norm),
        "pre_norm": norm(model.norm_pre),
        "fc_norm": norm(model.fc_norm),
        "pool": model.global_pool,
        "prefix": model.num_prefix_tokens,
        "pool_include_prefix": model.pool_include_prefix,
        "no_embed_class": model.no_embed_class,
        "image_size": list(model.patch_embed.img_size),
    }


def main():
    for cls in READ:
        record(cls)
    names = [name for name in timm.list_models() if _registry._model_to_module[name] in MODULES]
    table, records, failed = {}, {}, []
    for name in names:
        module = _registry._model_to_module[name]
        if module not in ("vision_transformer", "deit", "swin_transformer", "swin_transformer_v2"):
            table[name] = [f"network of timm's {module}.py"]
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
        except Exception as error:
            failed.append((name, repr(error)[:100]))
            continue
        cls = type(model)
        shapes = {}
        for key, value in model.state_dict().items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", key)
            numbers = re.findall(r"(?<=\.)\d+(?=\.)", key)
            shapes.setdefault(f"{pattern} {list(value.shape)}", []).append(".".join(numbers))
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            try:
                _hub.save_config_for_hf(model, file.name)
                config = json.loads(pathlib.Path(file.name).read_text())
            except Exception as error:
                failed.append((name, "config " + repr(error)[:100]))
                continue
        table[name] = [cls.__name__, arguments(cls), preprocessing(name)] if cls in READ else [cls.__name__]
        records[name] = {"tensors": shapes, "config": config, "facts": facts(model) if cls in READ else None}
    print(len(table), "recorded; failed:", failed)
    lines = [
        f" {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in sorted(table.items())
    ]
    (PACKAGE / "timm_models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    with gzip.GzipFile(FOLDER / "timm_models.json.gz", "wb", compresslevel=9, mtime=0) as file:
        file.write(json.dumps(records, separators=(",", ":")).encode())


if __name__ == "__main__":
    main()
