"""Names of timm's and the official Swin's tensors.

ViT (timm vision_transformer.py), Swin V1 and V2 (timm swin_transformer.py, swin_transformer_v2.py; the official files
call the merge after stage s `layers.s.downsample`, timm `layers.<s+1>.downsample`, and the classifier head, not
head.fc). Index and mask buffers of old files are rebuilt from sizes and never read.
"""

import dataclasses
import re
from typing import Any

from vit_scaling import UserError
from vit_scaling.interop import convert, normalisation, timm_models
from vit_scaling.interop.convert import Entry, entry
from vit_scaling.interop.layout import (
    Described,
    Json,
    Layout,
    Tensors,
    shape_of,
    swin_size,
    vit_grid,
    vit_heads,
)
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.timm_models import Known
from vit_scaling.models import ModelConfig, swin, vit
from vit_scaling.ops import windows

IGNORED = (r".*\.(relative_position_index|attn_mask|relative_coords_table)",)
VIT_EPS, SWIN_EPS = 1e-6, 1e-5
# Fields of ViTConfig that exports leave as they are in the plain network.
PLAIN = {
    "mlp_kind": "gelu",
    "norm": "layernorm",
    "pre_norm": False,
    "key_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "pool_prefix": False,
    "qk_norm_bias": False,
    "layerscale_mlp": None,
}
# Tensors of networks that timm's names belong to and models here do not have.
RECOGNISED = (
    (r"dist_token", "a distilled DeiT, which averages the heads of two tokens"),
    (r"blocks\.0\.attn\.q_bias|blocks\.0\.gamma_[12]_?|rel_pos_bias\..*", "BEiT"),
    (r"blocks\.0\.attn\.relative_position_bias_table", "BEiT, with relative positions in every block"),
)


def canonical(tensors: Tensors) -> dict[str, Any] | None:
    if "patch_embed.proj.weight" not in tensors:
        return None
    if any(name.startswith("layers.0.downsample.") for name in tensors):
        tensors = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name): tensor
            for name, tensor in tensors.items()
        }
    if "blocks.0.gamma_1" in tensors and "blocks.0.attn.qkv.bias" in tensors:  # the official DeiT-III
        tensors = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): tensor for name, tensor in tensors.items()}
    swin_head = any(name.startswith("layers.") for name in tensors)
    rename = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"} if swin_head else {}
    return {rename.get(name, name): tensor for name, tensor in tensors.items()}


def describe(tensors: Tensors, neighbour: Json | None, trained_size: tuple[int, int] | None) -> Described:
    known = timm_models.known(neighbour)
    for name, what in RECOGNISED if known is None else ():
        if any(re.fullmatch(name, tensor) for tensor in tensors):
            raise UserError(f"the tensors are those of {what}; models here do not have that")
    stages = "layers.0.blocks.0.attn.qkv.weight" in tensors
    if known is not None and stages != (known.kind != timm_models.VIT):
        raise UserError(f"config.json says {known.architecture}, a {known.kind}, and the tensors are of another class")
    described = (_describe_swin if stages else _describe_vit)(tensors, known, trained_size)
    if known is not None:
        return dataclasses.replace(described, normalisation=known.normalisation, class_names=known.class_names)
    return dataclasses.replace(described, normalisation=normalisation.family("swin") if stages else None)


def _describe_vit(tensors: Tensors, known: Known | None, trained_size: tuple[int, int] | None) -> Described:
    width, _, *sides = shape_of(tensors, "patch_embed.proj.weight", 4)
    arguments = known.arguments if known else {}
    patch = (sides[0], sides[1])
    heads = arguments.get("num_heads", 12 if known else None) or vit_heads(width) or width // 64 or 1
    token, registers = "cls_token" in tensors, 0
    if "reg_token" in tensors:
        registers = shape_of(tensors, "reg_token", 3)[1]
    # Of a file without config.json: as its tensors suggest. The list of what is assumed says so.
    pool = "map" if "attn_pool.latent" in tensors else "token" if token and "fc_norm.weight" not in tensors else "gap"
    kind, eps, gelu = "layernorm", VIT_EPS, "exact"
    if known is not None:
        pool = _pool(known)
        (kind, eps), gelu = timm_models.norm(known, VIT_EPS), "tanh"
    mlp, *_ = shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)
    swiglu = arguments.get("mlp_layer", "Mlp") not in ("Mlp", "mlp") or (
        known is None
        and "blocks.0.mlp.fc2.weight" in tensors
        and 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1] == mlp
    )
    if known is not None and not swiglu:
        gelu = timm_models.gelu(known)
    config = vit.ViTConfig(
        width=width,
        depth=convert.count(tensors, r"blocks\.(\d+)\."),
        mlp=mlp // 2 if swiglu else mlp,
        heads=int(heads),
        patch=patch,
        pool=pool,
        class_token=token and pool != "token",
        pool_prefix=bool(arguments.get("pool_include_prefix", False)) and pool != "token",
        pool_norm="fc_norm.weight" in tensors and pool != "token",
        position="learned" if "pos_embed" in tensors else "none",
        registers=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in tensors else None,
        mlp_kind="swiglu" if swiglu else "gelu",
        norm=kind,
        pre_norm="norm_pre.weight" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        qk_norm_bias="blocks.0.attn.q_norm.bias" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        mlp_bias="blocks.0.mlp.fc1.bias" in tensors,
        norm_bias="blocks.0.norm1.bias" in tensors or kind == "rmsnorm",
        pre_logits="pre_logits.fc.weight" in tensors,
        gelu=gelu,
        norm_eps=eps,
    )
    if "fc_norm.weight" in tensors and pool == "token":
        raise timm_models.refusal(known.architecture if known else "a ViT", "fc_norm", True)
    prefixes = [token + registers, 0] if token or registers else [0]
    if known is not None:
        prefixes = [0 if arguments.get("no_embed_class") else token + registers]
    elif token and registers:
        prefixes = [0, 1, 1 + registers]
    given = trained_size or (known.image_size if known else None)
    size, rows = given or patch, 0
    if "pos_embed" in tensors:
        size, rows = vit_grid(shape_of(tensors, "pos_embed", 3)[1], patch, prefixes, given)
    elif given is None:
        raise UserError("the weights have no position table, so the image size is not known; give trained_size")
    classes = _classes(tensors, "head.weight")
    if known is not None:
        return Described(config, size, classes, (), rows)
    unknown = ("heads",) if vit_heads(width) is None else ()
    return Described(config, size, classes, ("heads", "gelu", "norm_eps", "pool"), rows, unknown)


def _pool(known: Known) -> str:
    value = known.arguments.get("global_pool", "token")
    pools = {"token": "token", "map": "map", "avg": "gap", "max": "max", "avgmax": "avgmax"}
    if value not in pools:
        raise timm_models.refusal(known.architecture, "global_pool", value)
    return pools[value]


def _describe_swin(tensors: Tensors, known: Known | None, trained_size: tuple[int, int] | None) -> Described:
    width, _, *patch = shape_of(tensors, "patch_embed.proj.weight", 4)
    arguments = known.arguments if known else {}
    stages = range(convert.count(tensors, r"layers\.(\d+)\.blocks\."))
    second = "layers.0.blocks.0.attn.cpb_mlp.0.weight" in tensors
    tables: list[tuple[int, ...]] = []
    window = arguments.get("window_size", 7 if known else None)
    if second:
        heads = [shape_of(tensors, f"layers.{s}.blocks.0.attn.logit_scale", 3)[0] for s in stages]
    else:
        tables = [shape_of(tensors, f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2) for s in stages]
        heads = [table[1] for table in tables]
        window = max(windows.table_window(table[0]) for table in tables) if known is None else window
    if isinstance(window, list | tuple):
        if len(set(window)) > 1:
            raise timm_models.refusal(known.architecture if known else "a Swin", "window_size", window)
        window = window[0]
    pretrained = arguments.get("pretrained_window_sizes")
    config = swin.SwinConfig(
        version=2 if second else 1,
        width=width,
        depths=tuple(convert.count(tensors, rf"layers\.{s}\.blocks\.(\d+)\.") for s in stages),
        heads=tuple(heads),
        window=int(window or 8),
        patch=patch[0],
        mlp_ratio=shape_of(tensors, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] // width,
        patch_norm="patch_embed.norm.weight" in tensors,
        absolute_position="absolute_pos_embed" in tensors,
        pretrained_windows=tuple(pretrained) if second and pretrained and any(pretrained) else None,
        gelu=timm_models.gelu(known) if known else "exact",
        norm_eps=timm_models.norm(known, SWIN_EPS)[1] if known else SWIN_EPS,
    )
    ratio = arguments.get("mlp_ratio", 4.0)
    if known is not None and ratio != config.mlp_ratio:
        raise timm_models.refusal(known.architecture, "mlp_ratio", ratio)
    classes = _classes(tensors, "head.fc.weight")
    size = trained_size or (known.image_size if known else None)
    if known is not None and size is not None:
        return Described(config, size, classes)
    if second and trained_size is None:
        raise UserError(
            "neither names nor shapes of the weights tell model.window; "
            "put their config.json beside them, or give the model config and the trained_size"
        )
    unknown = ("window",) if second else ()
    assumed = ("norm_eps", "gelu", *unknown)
    return Described(config, swin_size(tables, config.window, size), classes, assumed, unknown=unknown)


def _classes(tensors: Tensors, name: str) -> int | None:
    return shape_of(tensors, name, 2)[0] if name in tensors else None


def entries(config: ModelConfig, prefix_rows: int, head: bool) -> list[Entry]:
    if isinstance(config, vit.ViTConfig):
        return _vit_entries(config, prefix_rows, head)
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


def _vit_entries(config: vit.ViTConfig, prefix_rows: int, head: bool) -> list[Entry]:
    has_class = vit.prefix_tokens(config) > config.registers
    norm_bias = config.norm_bias and config.norm == "layernorm"
    found = _linear("patch_embed.proj", "embedding", kind="conv", bias=not config.pre_norm)
    if config.position == "learned":
        prefix = (("class_token+",) if has_class else ()) + (("registers+",) if config.registers else ())
        prefix = prefix if prefix_rows > 1 or not has_class else prefix[:1]
        ours = (*(prefix if prefix_rows else ()), "position_embedding")
        found.append(Entry("pos_embed", ours, "lead", axis=1 if prefix_rows else 0))
    found += [entry("cls_token", "class_token", "lead")] if has_class else []
    found += [entry("reg_token", "registers", "lead")] if config.registers else []
    found += _norm("norm_pre", "pre_norm", norm_bias) if config.pre_norm else []
    for i in range(config.depth):
        theirs, ours_ = f"blocks.{i}", f"blocks/{i}"
        attention = [f"{ours_}/attention/{part}" for part in ("query", "key", "value")]
        found += _norm(f"{theirs}.norm1", f"{ours_}/norm1", norm_bias)
        found += _linear(f"{theirs}.attn.qkv", *attention, bias=config.qkv_bias)
        if config.qk_norm:
            for part in ("query", "key"):
                found += _norm(f"{theirs}.attn.{part[0]}_norm", f"{ours_}/attention/{part}_norm", config.qk_norm_bias)
        found += _linear(f"{theirs}.attn.proj", f"{ours_}/attention/out", kind="out", bias=config.proj_bias)
        found += _norm(f"{theirs}.norm2", f"{ours_}/norm2", norm_bias)
        up = [f"{ours_}/mlp/gate", f"{ours_}/mlp/up"] if config.mlp_kind == "swiglu" else [f"{ours_}/mlp/up"]
        found += _linear(f"{theirs}.mlp.fc1", *up, bias=config.mlp_bias)
        found += _linear(f"{theirs}.mlp.fc2", f"{ours_}/mlp/down", bias=config.mlp_bias)
        if config.layerscale is not None:
            found += [entry(f"{theirs}.ls{n}.gamma", f"{ours_}/layerscale{n}", "same") for n in (1, 2)]
    found += _norm("fc_norm" if config.pool_norm else "norm", "norm", norm_bias)
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


def neighbour(
    config: ModelConfig,
    image_size: tuple[int, int],
    num_classes: int,
    found: Normalisation,
    class_names: tuple[str, ...] | None,
) -> dict[str, Any]:
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
            **normalisation.timm_fields(found, image_size),
            "num_classes": num_classes,
            **({"label_names": list(class_names)} if class_names else {}),
        },
    }


def refuse(layout: str, config: ModelConfig, **wanted: Any) -> None:
    """Raises UserError for the first field that is not what the layout's networks have."""
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise UserError(
                f"{layout} has no such network: model.{field} is {getattr(config, field)!r}, and there it is {value!r}"
            )


def _vit_arguments(config: vit.ViTConfig) -> dict[str, Any]:
    refuse("timm", config, parallel=False, qk_norm=False, norm_bias=True, norm_eps=VIT_EPS, pre_logits=False)
    refuse("timm", config, **(PLAIN | {"gelu": "tanh" if config.gelu == "tanh" else "exact"}))
    ratio = config.mlp / config.width
    return {
        "patch_size": list(config.patch) if config.patch[0] != config.patch[1] else config.patch[0],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        # timm cuts width x ratio to a whole number.
        "mlp_ratio": ratio if int(config.width * ratio) == config.mlp else (config.mlp + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "class_token": vit.prefix_tokens(config) > config.registers,
        "reg_tokens": config.registers,
        "no_embed_class": bool(config.registers),
        "init_values": config.layerscale,
        "global_pool": {"gap": "avg"}.get(config.pool, config.pool),
        "fc_norm": config.pool_norm,
        "act_layer": "gelu_tanh" if config.gelu == "tanh" else "gelu",
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
