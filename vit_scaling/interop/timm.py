"""Names of timm's and the official Swin's tensors.

ViT (timm vision_transformer.py), Swin V1 and V2 (timm swin_transformer.py, swin_transformer_v2.py; the official files
call the merge after stage s `layers.s.downsample`, timm `layers.<s+1>.downsample`, and the classifier head, not
head.fc). Index and mask buffers of old files are rebuilt from sizes and never read.
"""

import re
from typing import Any

from vit_scaling import UserError
from vit_scaling.interop import convert
from vit_scaling.interop.convert import Entry, entry
from vit_scaling.interop.layout import (
    Described,
    Json,
    Layout,
    Tensors,
    shape_of,
    size_pair,
    swin_size,
    vit_grid,
    vit_heads,
)
from vit_scaling.models import ModelConfig, swin, vit
from vit_scaling.ops import windows

IGNORED = (r".*\.(relative_position_index|attn_mask|relative_coords_table)",)
VIT_EPS, SWIN_EPS = 1e-6, 1e-5
ACTIVATIONS = {"gelu": "exact", "gelu_tanh": "tanh"}


def canonical(tensors: Tensors) -> dict[str, Any] | None:
    if "patch_embed.proj.weight" not in tensors:
        return None
    if any(name.startswith("layers.0.downsample.") for name in tensors):
        tensors = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name): tensor
            for name, tensor in tensors.items()
        }
    swin_head = any(name.startswith("layers.") for name in tensors)
    rename = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"} if swin_head else {}
    return {rename.get(name, name): tensor for name, tensor in tensors.items()}


def describe(tensors: Tensors, neighbour: Json | None, image_size: tuple[int, int] | None) -> Described:
    arguments = dict((neighbour or {}).get("model_args") or {})
    if "patch_embed.norm.weight" in tensors or "layers.0.blocks.0.attn.qkv.weight" in tensors:
        return _describe_swin(tensors, neighbour or {}, arguments, image_size)
    return _describe_vit(tensors, arguments, image_size)


def _describe_vit(tensors: Tensors, arguments: dict[str, Any], image_size: tuple[int, int] | None) -> Described:
    if any(name.startswith("fc_norm.") for name in tensors):
        raise UserError("the weights have fc_norm, a norm after mean pooling; models here have it before the pooling")
    width, _, *patch = shape_of(tensors, "patch_embed.proj.weight", 4)
    heads = arguments.get("num_heads") or vit_heads(width) or width // 64 or 1
    token, latent = "cls_token" in tensors, "attn_pool.latent" in tensors
    layerscale = 1.0 if "blocks.0.ls1.gamma" in tensors else None
    rows = shape_of(tensors, "pos_embed", 3)[1]
    size, class_row = vit_grid(rows, (patch[0], patch[1]), token, size_pair(arguments.get("img_size")), image_size)
    activation = str(arguments.get("act_layer", "gelu"))
    config = vit.ViTConfig(
        width=width,
        depth=convert.count(tensors, r"blocks\.(\d+)\."),
        mlp=shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        heads=int(heads),
        patch=(patch[0], patch[1]),
        pool="map" if latent else "token" if token else "gap",
        registers=shape_of(tensors, "reg_token", 3)[1] if "reg_token" in tensors else 0,
        layerscale=layerscale,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        norm_bias="blocks.0.norm1.bias" in tensors,
        pre_logits="pre_logits.fc.weight" in tensors,
        gelu=_activation(activation),
        norm_eps=VIT_EPS,
    )
    assumed = [] if "num_heads" in arguments else ["heads"]
    assumed += [] if "act_layer" in arguments else ["gelu"]
    unknown = ("heads",) if "heads" in assumed and vit_heads(width) is None else ()
    return Described(config, size, _classes(tensors, "head.weight"), (*assumed, "norm_eps"), class_row, unknown)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"config.json's model_args.act_layer is {name!r}; models here have {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _describe_swin(
    tensors: Tensors, neighbour: Json, arguments: dict[str, Any], image_size: tuple[int, int] | None
) -> Described:
    width, _, *patch = shape_of(tensors, "patch_embed.proj.weight", 4)
    stages = range(convert.count(tensors, r"layers\.(\d+)\.blocks\."))
    second = "layers.0.blocks.0.attn.cpb_mlp.0.weight" in tensors
    assumed: list[str] = ["norm_eps", "gelu"]
    tables: list[tuple[int, ...]] = []
    if second:
        heads = [shape_of(tensors, f"layers.{s}.blocks.0.attn.logit_scale", 3)[0] for s in stages]
        named = re.search(r"window(\d+)", str(neighbour.get("architecture", "")))
        window = arguments.get("window_size") or (int(named[1]) if named else None)
        if window is None:
            window = 8
            assumed.append("window")
    else:
        tables = [shape_of(tensors, f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2) for s in stages]
        heads = [table[1] for table in tables]
        window = max(windows.table_window(table[0]) for table in tables)
    pretrained = arguments.get("pretrained_window_sizes")
    config = swin.SwinConfig(
        version=2 if second else 1,
        width=width,
        depths=tuple(convert.count(tensors, rf"layers\.{s}\.blocks\.(\d+)\.") for s in stages),
        heads=tuple(heads),
        window=int(window),
        patch=patch[0],
        mlp_ratio=shape_of(tensors, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] // width,
        patch_norm="patch_embed.norm.weight" in tensors,
        absolute_position="absolute_pos_embed" in tensors,
        pretrained_windows=tuple(pretrained) if second and pretrained and any(pretrained) else None,
        norm_eps=SWIN_EPS,
    )
    size = size_pair(arguments.get("img_size")) or image_size
    classes = _classes(tensors, "head.fc.weight")
    unknown = tuple(field for field in assumed if field == "window")
    return Described(config, swin_size(tables, config.window, size), classes, tuple(assumed), unknown=unknown)


def _classes(tensors: Tensors, name: str) -> int | None:
    return shape_of(tensors, name, 2)[0] if name in tensors else None


def entries(config: ModelConfig, class_row: bool, head: bool) -> list[Entry]:
    if isinstance(config, vit.ViTConfig):
        return _vit_entries(config, class_row, head)
    assert isinstance(config, swin.SwinConfig)
    return _swin_entries(config, head)


def _norm(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    scale = entry(f"{theirs}.weight", f"{ours}/scale", "same")
    return [scale, entry(f"{theirs}.bias", f"{ours}/bias", "same")] if bias else [scale]


def _linear(theirs: str, *ours: str, kind: str = "linear", bias: bool = True) -> list[Entry]:
    kernel = Entry(f"{theirs}.weight", tuple(f"{name}/kernel" for name in ours), kind)
    return [kernel, Entry(f"{theirs}.bias", tuple(f"{name}/bias" for name in ours), "flat")] if bias else [kernel]


def _mlp(theirs: str, ours: str) -> list[Entry]:
    return _linear(f"{theirs}.fc1", f"{ours}/up") + _linear(f"{theirs}.fc2", f"{ours}/down")


def _vit_entries(config: vit.ViTConfig, class_row: bool, head: bool) -> list[Entry]:
    found = _linear("patch_embed.proj", "embedding", kind="conv")
    found.append(
        Entry("pos_embed", ("class_token+", "position_embedding"), "lead", axis=1)
        if class_row
        else entry("pos_embed", "position_embedding", "lead")
    )
    found += [entry("cls_token", "class_token", "lead")] if config.pool == "token" else []
    found += [entry("reg_token", "registers", "lead")] if config.registers else []
    for i in range(config.depth):
        theirs, ours = f"blocks.{i}", f"blocks/{i}"
        attention = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
        found += _norm(f"{theirs}.norm1", f"{ours}/norm1", config.norm_bias)
        found += _linear(f"{theirs}.attn.qkv", *attention, bias=config.qkv_bias)
        found += _linear(f"{theirs}.attn.proj", f"{ours}/attention/out", kind="out")
        found += _norm(f"{theirs}.norm2", f"{ours}/norm2", config.norm_bias)
        found += _mlp(f"{theirs}.mlp", f"{ours}/mlp")
        if config.layerscale is not None:
            found += [entry(f"{theirs}.ls{n}.gamma", f"{ours}/layerscale{n}", "same") for n in (1, 2)]
    found += _norm("norm", "norm", config.norm_bias)
    if config.pool == "map":
        found.append(entry("attn_pool.latent", "pool/probe", "lead"))
        found += _linear("attn_pool.q", "pool/attention/query")
        found += _linear("attn_pool.kv", "pool/attention/key", "pool/attention/value")
        found += _linear("attn_pool.proj", "pool/attention/out", kind="out")
        found += _norm("attn_pool.norm", "pool/norm") + _mlp("attn_pool.mlp", "pool/mlp")
    found += _linear("pre_logits.fc", "pre_logits") if config.pre_logits else []
    return found + (_linear("head", "head") if head else [])


def _swin_entries(config: swin.SwinConfig, head: bool) -> list[Entry]:
    found = _linear("patch_embed.proj", "embedding", kind="conv")
    found += _norm("patch_embed.norm", "embedding_norm") if config.patch_norm else []
    found += [entry("absolute_pos_embed", "position_embedding", "lead")] if config.absolute_position else []
    for s, depth in enumerate(config.depths):
        if s:
            found += _norm(f"layers.{s}.downsample.norm", f"stage{s}/merging/norm")
            found += _linear(f"layers.{s}.downsample.reduction", f"stage{s}/merging/reduction", bias=False)
        for b in range(depth):
            theirs, ours = f"layers.{s}.blocks.{b}", f"stage{s + 1}/blocks/{b // 2}/{('plain', 'shifted')[b % 2]}"
            attention = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
            found += _norm(f"{theirs}.norm1", f"{ours}/norm1") + _norm(f"{theirs}.norm2", f"{ours}/norm2")
            found += _linear(f"{theirs}.attn.qkv", *attention, bias=config.version == 1)
            found += _linear(f"{theirs}.attn.proj", f"{ours}/attention/out", kind="out")
            found += _mlp(f"{theirs}.mlp", f"{ours}/mlp")
            if config.version == 1:
                table = "relative_position_bias_table"
                found.append(entry(f"{theirs}.attn.{table}", f"{ours}/attention/{table}", "same"))
            else:
                found.append(entry(f"{theirs}.attn.q_bias", f"{attention[0]}/bias", "flat"))
                found.append(entry(f"{theirs}.attn.v_bias", f"{attention[2]}/bias", "flat"))
                found.append(entry(f"{theirs}.attn.logit_scale", f"{ours}/attention/logit_scale", "column"))
                found += _linear(f"{theirs}.attn.cpb_mlp.0", f"{ours}/attention/cpb_mlp/up")
                found += _linear(f"{theirs}.attn.cpb_mlp.2", f"{ours}/attention/cpb_mlp/down", bias=False)
    found += _norm("norm", "norm")
    return found + (_linear("head.fc", "head") if head else [])


def neighbour(config: ModelConfig, image_size: tuple[int, int], num_classes: int) -> dict[str, Any]:
    """Returns the config.json from which `timm.create_model("local-dir:FOLDER")` makes the same network.

    Raises:
        UserError: timm has no such network; the sentence names the field.
    """
    if isinstance(config, vit.ViTConfig):
        architecture, arguments = "vit_base_patch16_224", _vit_arguments(config)
    elif isinstance(config, swin.SwinConfig):
        architecture, arguments = _swin_arguments(config)
    else:
        raise UserError(f"timm's layout is written for ViT and Swin, not for a {type(config).__name__}")
    features = config.width if isinstance(config, vit.ViTConfig) else config.width * 2 ** (len(config.depths) - 1)
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": features,
        "model_args": {"img_size": list(image_size), **arguments},
        "pretrained_cfg": {
            "input_size": [3, *image_size],
            "num_classes": num_classes,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
        },
    }


def refuse(layout: str, config: ModelConfig, **wanted: Any) -> None:
    """Raises ValueError for the first field that is not what the layout's networks have."""
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise UserError(
                f"{layout} has no such network: model.{field} is {getattr(config, field)!r}, and there it is {value!r}"
            )


def _vit_arguments(config: vit.ViTConfig) -> dict[str, Any]:
    refuse("timm", config, parallel=False, qk_norm=False, norm_bias=True, norm_eps=VIT_EPS, pre_logits=False)
    ratio = config.mlp / config.width
    return {
        "patch_size": list(config.patch) if config.patch[0] != config.patch[1] else config.patch[0],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        # timm cuts width x ratio to a whole number.
        "mlp_ratio": ratio if int(config.width * ratio) == config.mlp else (config.mlp + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "class_token": config.pool == "token",
        "reg_tokens": config.registers,
        "no_embed_class": bool(config.registers),
        "init_values": config.layerscale,
        "global_pool": {"token": "token", "map": "map", "gap": "avg"}[config.pool],
        "fc_norm": False,
        "act_layer": {exact: name for name, exact in ACTIVATIONS.items()}[config.gelu],
    }


def _swin_arguments(config: swin.SwinConfig) -> tuple[str, dict[str, Any]]:
    refuse(
        "timm",
        config,
        patch_norm=True,
        absolute_position=False,
        norm_eps=SWIN_EPS,
        gelu="exact",
        shifted=True,
        extra_norm_every=None,
    )
    arguments: dict[str, Any] = {
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": config.window,
        "mlp_ratio": float(config.mlp_ratio),
    }
    if config.version == 1:
        return "swin_tiny_patch4_window7_224", arguments
    arguments["pretrained_window_sizes"] = list(config.pretrained_windows or [0] * len(config.depths))
    return "swinv2_tiny_window8_256", arguments


LAYOUT = Layout("timm", canonical, IGNORED, describe, entries, neighbour)
