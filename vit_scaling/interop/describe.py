"""Which network do names and shapes of tensors describe, whoever named them? What they leave open, a config tells.

`told` holds fields of the model by name, and image_size, as a config beside the tensors says them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_scaling import UserError
from vit_scaling.interop import convert, normalisation
from vit_scaling.interop.families import Family
from vit_scaling.interop.layout import Described, Tensors, swin_size, vit_grid, vit_heads
from vit_scaling.models import ModelConfig, swin, vit
from vit_scaling.ops import windows


class Look:
    """Looks tensors of a family up by the path of our parameter."""

    def __init__(self, family: Family, tensors: Tensors):
        self.family, self._tensors = family, tensors

    def has(self, path: str) -> bool:
        return self._name(path) in self._tensors

    def shape(self, path: str, dims: int) -> tuple[int, ...]:
        """Returns a tensor's shape, in PyTorch's order of axes.

        Raises:
            UserError: it is not there, or has another number of axes.
        """
        name = self._name(path)
        if name not in self._tensors:
            raise UserError(
                f"the weights have no tensor {name!r}, so what network of the family {self.family.name} they are of "
                f"cannot be told"
            )
        shape = self._tensors[name].shape
        if len(shape) != dims or not all(shape):
            raise UserError(f"the tensor {name!r} has the shape {shape}; it must have {dims} axes, none of them empty")
        return shape[::-1] if self.family.layout == "big_vision" else shape

    def count(self, path: str, number: str) -> int:
        """Returns how many layers there are; `number` is which of the numbers in `path` counts them."""
        return convert.count(self._tensors, re.escape(self._name(path).split(number)[0]) + r"(\d+)\b")

    def _name(self, path: str) -> str:
        found = convert.their_name(self.family, path)
        return "" if found is None else found[0]


def vision_transformer(look: Look, told: Mapping[str, Any], trained_size: tuple[int, int] | None) -> Described:
    """Returns the ViT that tensors and a config describe.

    Raises:
        UserError: they contradict each other, or leave the grid of the positions open.
    """
    family = look.family
    width, _, *sides = look.shape("embedding/kernel", 4)
    if family.layout == "big_vision":
        sides.reverse()
    depth = look.count("blocks/7/norm1/scale", "7")
    hidden = look.shape("blocks/0/mlp/down/kernel", 2)[1]
    up = look.shape("blocks/0/mlp/up/kernel", 2)[0]
    gated = look.has("blocks/0/mlp/gate/kernel") and (family.name == "DINOv3" or up == 2 * hidden)
    token, registers = look.has("class_token"), 0
    if look.has("registers"):
        registers = look.shape("registers", 3)[1]
    heads = told.get("heads") or vit_heads(width) or width // 64 or 1
    if family.layout == "big_vision":
        heads = look.shape("blocks/0/attention/query/kernel", 3)[1]
    usual: dict[str, Any] = {"pool": "token" if token and not told.get("pool_norm") else "gap", **family.usual, **told}
    if look.has("pool/probe") and "pool" not in told:
        usual["pool"] = "map"
    kind = usual.get("norm", "layernorm")
    config = vit.ViTConfig(
        width=width,
        depth=depth,
        mlp=hidden,
        heads=int(heads),
        patch=(sides[0], sides[1]),
        pool=usual["pool"],
        class_token=token and usual["pool"] not in vit.TOKEN_POOLS,
        pool_prefix=bool(told.get("pool_prefix")) and usual["pool"] not in vit.TOKEN_POOLS,
        pool_norm=bool(told.get("pool_norm")) and usual["pool"] not in vit.TOKEN_POOLS,
        position="learned" if look.has("position_embedding") else usual.get("position", "none"),
        registers=registers,
        layerscale=1.0 if look.has("blocks/0/layerscale1") else None,
        mlp_kind="swiglu" if gated else "gelu",
        norm=kind,
        pre_norm=look.has("pre_norm/scale"),
        qk_norm=look.has("blocks/0/attention/query_norm/scale"),
        qk_norm_bias=look.has("blocks/0/attention/query_norm/bias"),
        qkv_bias=look.has("blocks/0/attention/query/bias"),
        key_bias=look.has("blocks/0/attention/key/bias") or not look.has("blocks/0/attention/query/bias"),
        proj_bias=look.has("blocks/0/attention/out/bias"),
        mlp_bias=look.has("blocks/0/mlp/down/bias"),
        norm_bias=look.has("blocks/0/norm1/bias") or kind == "rmsnorm",
        pre_logits=look.has("pre_logits/kernel"),
        gelu="tanh" if gated and told else usual.get("gelu", "exact"),
        norm_eps=usual["norm_eps"],
    )
    agree(config, told)
    size, prefix = _grid(look, config, told, trained_size, int(token), registers)
    assumed = tuple(field for field in ("heads", "gelu", "norm_eps", "pool") if field not in told)
    if family.layout == "big_vision":
        assumed = ("gelu", "norm_eps")
    elif family.layout != "timm":
        assumed = tuple(field for field in assumed if field != "pool")
    unknown = ("heads",) if "heads" in assumed and vit_heads(width) is None else ()
    pixels = None if family.pixels is None else normalisation.family(family.pixels)
    return Described(config, size, _classes(look), assumed, prefix, unknown, pixels)


def agree(config: ModelConfig, told: Mapping[str, Any]) -> None:
    """Raises UserError where a config tells another shape of the network than the tensors have."""
    for field in ("width", "depth", "mlp", "patch", "mlp_kind", "depths", "mlp_ratio"):
        if field in told and told[field] != getattr(config, field):
            raise UserError(
                f"config.json says that model.{field} is {told[field]}, and the tensors are of a network with "
                f"{getattr(config, field)}; the file is not whole, or the config is another network's"
            )


def _grid(
    look: Look, config: vit.ViTConfig, told: Mapping[str, Any], trained_size: Any, token: int, registers: int
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Returns (image size, the parameters that have rows of their own at the start of the position table)."""
    given = trained_size or told.get("image_size")
    if not look.has("position_embedding"):
        if given is None:
            raise UserError("the weights have no position table, so the image size is not known; give trained_size")
        return given, ()
    lead = look.family.layout == "big_vision"
    shape = look.shape("position_embedding", 2 if look.family.table["position_embedding"].endswith("|same") else 3)
    rows = shape[-2]
    prefixes: Sequence[int]
    if "rows" in told:
        prefixes = (told["rows"],)
    elif look.family.rows is None:
        prefixes = (
            [0, 1, 1 + registers] if token and registers else [token + registers, 0] if token + registers else [0]
        )
    else:
        prefixes = (token * ("class" in look.family.rows) + registers * ("registers" in look.family.rows),)
    size, own = vit_grid(rows, config.patch, prefixes, given, square=lead)
    return size, tuple(["class_token"] * min(token, own) + ["registers"] * (own > token))


def swin_transformer(look: Look, told: Mapping[str, Any], trained_size: tuple[int, int] | None) -> Described:
    """Returns the Swin that tensors and a config describe.

    Raises:
        UserError: they leave its windows open.
    """
    width, _, *patch = look.shape("embedding/kernel", 4)
    first = "stage{}/blocks/0/plain/"
    stages = range(1, look.count("stage98/blocks/0/plain/norm1/scale", "97") + 1)
    second = look.has(f"{first.format(1)}attention/logit_scale")
    tables: list[tuple[int, ...]] = []
    if second:
        heads = [look.shape(f"{first.format(s)}attention/logit_scale", 3)[0] for s in stages]
    else:
        tables = [look.shape(f"{first.format(s)}attention/relative_position_bias_table", 2) for s in stages]
        heads = [table[1] for table in tables]
    window = told.get("window") or (max(windows.table_window(table[0]) for table in tables) if tables else None)
    usual = {**look.family.usual, **told}
    config = swin.SwinConfig(
        version=2 if second else 1,
        width=width,
        depths=tuple(look.count(f"stage{s}/blocks/47/plain/norm1/scale", "94") for s in stages),
        heads=tuple(heads),
        window=int(window or 8),
        patch=patch[0],
        mlp_ratio=look.shape(f"{first.format(1)}mlp/up/kernel", 2)[0] // width,
        patch_norm=look.has("embedding_norm/scale"),
        absolute_position=look.has("position_embedding"),
        shift_rule=usual.get("shift_rule", "official"),
        pretrained_windows=told.get("pretrained_windows") if second else None,
        gelu=usual["gelu"],
        norm_eps=usual["norm_eps"],
    )
    agree(config, told)
    unknown = ("window",) if second and window is None else ()
    if unknown and trained_size is None and look.family.layout == "timm":
        raise UserError(
            "neither names nor shapes of the weights tell model.window; "
            "put their config.json beside them, or give the model config and the trained_size"
        )
    size = trained_size or told.get("image_size")
    if size is None or look.family.layout != "timm" or "image_size" not in told:
        size = swin_size(tables, config.window, size)
    # A file of timm without its config has names that the official code's files may have, too.
    open_fields = ("norm_eps", "gelu", *(("shift_rule",) if look.family.layout == "timm" else ()))
    assumed = tuple(field for field in open_fields if field not in told) + unknown
    pixels = normalisation.family("swin")
    return Described(config, size, _classes(look), assumed, (), unknown, pixels)


def _classes(look: Look) -> int | None:
    return look.shape("head/kernel", 2)[0] if look.has("head/kernel") else None
