"""What timm's config.json says about a network: its arguments, by the table of timm's registered names where needed.

timm_models.json is written by tests/golden/make_timm.py from timm's own definitions.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vit_scaling import UserError
from vit_scaling.interop import normalisation
from vit_scaling.interop.layout import Json
from vit_scaling.interop.normalisation import Normalisation

VIT, SWIN, SWIN2 = "VisionTransformer", "SwinTransformer", "SwinTransformerV2"
DISTILLED = "VisionTransformerDistilled"
SUPPORTED = (VIT, DISTILLED, SWIN, SWIN2)
# Arguments that change nothing of the forward pass.
INERT = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "strict_img_size", "dynamic_img_size", "num_classes", "img_size", "in_chans"),
)
# Arguments that only one value of can be expressed here, by class.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    VIT: {
        "scale_attn_norm": (False,),
        "scale_mlp_norm": (False,),
        "final_norm": (True,),
        "dynamic_img_pad": (False,),
        "embed_norm_layer": (None,),
        "embed_layer": ("PatchEmbed",),
        "block_fn": ("Block",),
        "attn_layer": ("Attention", ""),
        "mlp_layer": ("Mlp", "mlp", "GluMlp(act_layer=SiLU, gate_last=False)", "swiglupacked"),
        "pos_embed": ("learn", "none", ""),
    },
    SWIN: {"always_partition": (False,), "global_pool": ("avg",), "qkv_bias": (True,), "patch_norm": (True,)},
}
ONLY[SWIN2] = ONLY[SWIN]
READ = {
    VIT: (
        *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias"),
        *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "pool_include_prefix"),
        *("global_pool", "norm_layer", "act_layer"),
    ),
    SWIN: ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "norm_layer"),
}
READ[DISTILLED], ONLY[DISTILLED] = READ[VIT], ONLY[VIT]
READ[SWIN2] = (*READ[SWIN], "pretrained_window_sizes", "act_layer")


class Known(NamedTuple):
    """architecture: timm's name. kind: its class. arguments: of the class, defaults left out."""

    architecture: str
    kind: str
    arguments: dict[str, Any]
    normalisation: Normalisation | None
    image_size: tuple[int, int] | None
    class_names: tuple[str, ...] | None


@functools.cache
def table() -> dict[str, list[Any]]:
    """Returns {name: [class, arguments, preprocessing]}, of classes that are not read {name: [class]}."""
    return json.loads((Path(__file__).parent / "timm_models.json").read_text())


def known(neighbour: Json | None) -> Known | None:
    """Returns what a config.json of timm says; None if there is none.

    Raises:
        UserError: the architecture is not in the table, is of a class that is not read, or an argument changes the
            network in a way that models here do not have.
    """
    if neighbour is None or "architecture" not in neighbour:
        return None
    architecture = str(neighbour["architecture"]).split(".")[0]
    pretrained = neighbour.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, Mapping) else neighbour  # the older, flat form
    if architecture not in table():
        raise UserError(
            f"config.json's architecture {architecture!r} is not one of the {len(table())} vision transformers of timm "
            "1.0.31 that are known here; remove config.json and give the model config instead"
        )
    kind, *rest = table()[architecture]
    if kind not in SUPPORTED:
        raise UserError(
            f"this is timm's {architecture}, a {kind}; models here read {', '.join(SUPPORTED)} and not that class"
        )
    arguments = {**rest[0], **(neighbour.get("model_args") or {})}
    _check(architecture, kind, arguments)
    found = normalisation.from_timm(pretrained)
    if found is None and rest[1] is not None:
        found = normalisation.from_timm(rest[1], f"timm's table of {architecture}")
    size = arguments.get("img_size") or (pretrained.get("input_size") or [None])[1:]
    labels = neighbour.get("label_names") or pretrained.get("label_names")
    return Known(architecture, kind, arguments, found, _pair(size), tuple(map(str, labels)) if labels else None)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _check(architecture: str, kind: str, arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        allowed = ONLY[kind].get(name)
        if allowed is not None and value not in allowed:
            raise refusal(architecture, name, value)
        if allowed is None and name not in READ[kind] and name not in INERT:
            raise refusal(architecture, name, value)
    if arguments.get("in_chans", 3) != 3:
        raise refusal(architecture, "in_chans", arguments["in_chans"])


def refusal(architecture: str, name: str, value: Any) -> UserError:
    return UserError(f"this is timm's {architecture} with {name} {value!r}, which models here do not have")


def norm(known: Known, default: float) -> tuple[str, float]:
    """Returns (model.norm, model.norm_eps) of a norm_layer, such as "LayerNorm(eps=1e-05)" or "rmsnorm".

    Raises:
        UserError: there is no such norm here.
    """
    value = known.arguments.get("norm_layer") or "LayerNorm"
    match = re.fullmatch(r"(\w+)(?:\((?:eps=([\d.e-]+))?\))?", str(value))
    kinds = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
    if match is None or match[1].lower() not in kinds:
        raise refusal(known.architecture, "norm_layer", value)
    return kinds[match[1].lower()], float(match[2] or default)


def gelu(known: Known) -> str:
    """Returns model.gelu of an act_layer.

    Raises:
        UserError: there is no such activation here.
    """
    value = known.arguments.get("act_layer") or "gelu"
    kinds = {"gelu": "exact", "gelutanh": "tanh", "quickgelu": "quick"}
    key = str(value).lower().replace("_", "")
    if key not in kinds:
        raise refusal(known.architecture, "act_layer", value)
    return kinds[key]
