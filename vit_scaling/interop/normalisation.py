"""How pixels become the input that weights were trained on: mean, deviation, resize and crop, read and written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vit_scaling import UserError

Channels = tuple[float, float, float]
Json = Mapping[str, Any]

HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Channels, Channels] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
NAMED = {"half": HALF, "imagenet": IMAGENET, "clip": CLIP, "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}

# Families whose published files all expect one normalisation, for files that carry none.
FAMILIES = {
    "google .npz": ("half", "vision_transformer and big_vision map pixels to [-1, 1] (value_range(-1, 1))"),
    "siglip": ("half", "SigLIP and SigLIP 2 (big_vision, arXiv 2303.15343; preprocessor files of google/siglip-*)"),
    "swin": ("imagenet", "Swin V1 and V2 (microsoft/Swin-Transformer, data/build.py: IMAGENET_DEFAULT_MEAN and STD)"),
    "deit": ("imagenet", "DeiT and DeiT-III (facebookresearch/deit, datasets.py)"),
    "dino": ("imagenet", "DINO, DINOv2 and DINOv3 (facebookresearch/dinov2, data/transforms.py)"),
    "mae": ("imagenet", "MAE (facebookresearch/mae, main_pretrain.py)"),
    "clip": ("clip", "CLIP and OpenCLIP (openai/CLIP, clip.py: _transform)"),
}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # of Pillow


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What weights were trained to see, and how their authors evaluate them; None where it is unknown.

    Attributes:
        mean, std: by channel, of pixels in [0, 1]; the model sees (pixels - mean) / std.
        interpolation: of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_ratio: side of the crop over the side resized to; 1 keeps everything.
        crop_mode: "center" resizes the shorter side and crops; "squash" resizes both sides; "border" pads.
        input_size: height and width in pixels after the crop.
        source: where this was read.
    """

    mean: Channels
    std: Channels
    interpolation: str | None = None
    crop_ratio: float | None = None
    crop_mode: str | None = None
    input_size: tuple[int, int] | None = None
    source: str = "asked for"

    @property
    def of_timm(self) -> bool:
        """Whether timm evaluates the weights, by torchvision's crop."""
        return "pretrained_cfg" in self.source or "timm" in self.source

    def __str__(self) -> str:
        name = next((name for name, pair in NAMED.items() if pair == (self.mean, self.std)), None)
        values = f"mean {_numbers(self.mean)}, std {_numbers(self.std)}" + (f" ({name})" if name else "")
        return f"{values}, from {self.source}"


def _numbers(values: Channels) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def named(text: str) -> Normalisation:
    """Returns what --normalisation=TEXT asks for: a name, or six numbers (means, then deviations).

    Raises:
        UserError: it is neither.
    """
    if text in NAMED:
        return Normalisation(*NAMED[text])
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != 6:
        raise UserError(
            f"normalisation is {text!r}; choose one of {', '.join(NAMED)}, or give six numbers: three means and three "
            "deviations of pixels in [0, 1]"
        )
    return _checked(values[:3], values[3:], "asked for")


def family(name: str) -> Normalisation:
    """Returns the normalisation that every published file of a family has."""
    pair, source = FAMILIES[name]
    return Normalisation(*NAMED[pair], source=source)


def from_processor(processor: Json) -> Normalisation | None:
    """Returns what a preprocessor_config.json says; None if it holds no mean.

    Raises:
        UserError: its numbers cannot be right.
    """
    source = "preprocessor_config.json"
    if processor.get("do_rescale") is False and processor.get("do_normalize") is not False:
        raise UserError(f"{source} has do_rescale false: its mean and std are not of pixels in [0, 1]")
    factor = processor.get("rescale_factor")
    if factor is not None and abs(float(factor) * 255 - 1) > 1e-3:
        raise UserError(f"{source} has rescale_factor {factor}; pixels are divided by 255 here: give --normalisation")
    if processor.get("do_normalize") is False:
        mean, std = NAMED["none"]
    elif processor.get("image_mean") is None or processor.get("image_std") is None:
        return None
    else:
        mean, std = processor["image_mean"], processor["image_std"]
    found = _checked(mean, std, source)
    size, crop = _size(processor.get("size")), _size(processor.get("crop_size"))
    resized = size[0] if size and processor.get("do_resize", True) else None
    cropped = processor.get("do_center_crop") and crop
    ratio = processor.get("crop_pct")
    if cropped and crop and resized:
        ratio = crop[0] / resized
    squash = size is not None and size[1] is not None and (bool(cropped) or ratio is None)
    final = crop if cropped else (size if size and size[1] is not None else None)
    return dataclasses.replace(
        found,
        interpolation=RESAMPLE.get(processor.get("resample", -1)),
        crop_ratio=1.0 if squash and not cropped else ratio,
        crop_mode="squash" if squash else "center" if ratio is not None else None,
        input_size=(final[0], final[1] or final[0]) if final else None,
    )


def from_timm(pretrained: Json, source: str = "config.json's pretrained_cfg") -> Normalisation | None:
    """Returns what timm's pretrained_cfg says; None if it holds no mean.

    Raises:
        UserError: its numbers cannot be right.
    """
    if pretrained.get("mean") is None or pretrained.get("std") is None:
        return None
    found = _checked(pretrained["mean"], pretrained["std"], source)
    size = pretrained.get("input_size")
    return dataclasses.replace(
        found,
        interpolation=pretrained.get("interpolation"),
        crop_ratio=pretrained.get("crop_pct"),
        crop_mode=pretrained.get("crop_mode"),
        input_size=(int(size[1]), int(size[2])) if isinstance(size, list | tuple) and len(size) == 3 else None,
    )


def of_transform(found: Normalisation, transform: Json) -> tuple[Normalisation, str | None]:
    """Returns (the normalisation with resize and crop of a run's evaluation, what other libraries do not have of it).

    transform: `data.eval_transform` of the run's config.
    """
    filters = {"antialias": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos"}
    crop, resize, size = transform["crop"], transform["resize"], tuple(transform["size"])
    cuts = "central" in crop
    ratio = max(size) / transform["resize_to"] if cuts else 1.0
    if int(max(size) / ratio) != transform["resize_to"] and cuts:
        ratio = math.nextafter(ratio, 0)  # readers divide by it and cut
    whole = dataclasses.replace(
        found,
        interpolation=filters.get(resize, "bilinear"),
        crop_ratio=ratio,
        crop_mode="center" if crop.startswith("central") else "squash",
        input_size=size,
    )
    if crop == "none" or resize in filters:
        return whole, None
    return whole, (
        f"the run's evaluation resizes by {resize!r}, which other libraries do not have: exports say 'bilinear', and "
        f"predictions there differ a little"
    )


def timm_fields(found: Normalisation, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the keys of timm's pretrained_cfg. Where it is unknown, the whole image is squashed, as here."""
    return {
        "input_size": [3, *image_size],
        "mean": list(found.mean),
        "std": list(found.std),
        "interpolation": found.interpolation or "bilinear",
        "crop_pct": 1.0 if found.crop_ratio is None else found.crop_ratio,
        "crop_mode": found.crop_mode or "squash",
    }


def processor(found: Normalisation, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the preprocessor_config.json with which transformers' pipeline sees the same pixels."""
    size = {"height": image_size[0], "width": image_size[1]}
    common = {
        "do_resize": True,
        "size": size,
        "resample": {name: code for code, name in RESAMPLE.items()}[found.interpolation or "bilinear"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(found.mean),
        "image_std": list(found.std),
    }
    if found.crop_mode != "center":
        if found.crop_ratio is not None and found.crop_ratio < 1:
            larger = {name: int(side / found.crop_ratio) for name, side in size.items()}
            crop = {"do_center_crop": True, "crop_size": size, "size": larger}
            return {"image_processor_type": "DeiTImageProcessor", **common, **crop}
        return {"image_processor_type": "ViTImageProcessor", **common}
    shorter = int(min(image_size) / (found.crop_ratio or 1.0))
    crop = {"do_center_crop": True, "crop_size": size, "size": {"shortest_edge": shorter}}
    return {"image_processor_type": "BitImageProcessor", **common, **crop}


def _size(value: Any) -> tuple[int, int | None] | None:
    """Returns (height, width), or (shortest edge, None), of the forms that a preprocessor's sizes have."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and "height" in value and "width" in value:
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return int(value["shortest_edge"]), None
    return None


def _checked(mean: Any, std: Any, source: str) -> Normalisation:
    """Raises UserError unless there are three (or one) finite means and positive deviations of pixels in [0, 1]."""
    values = []
    for name, given, low in (("mean", mean, 0.0), ("std", std, 1e-6)):
        given = [given] if isinstance(given, int | float) else list(given)
        given = given * 3 if len(given) == 1 else given
        if len(given) != 3 or not all(isinstance(v, int | float) and low <= v <= 1 for v in given):
            raise UserError(f"{source}: {name} {given} must be three numbers from {low:g} to 1, of pixels in [0, 1]")
        values.append((float(given[0]), float(given[1]), float(given[2])))
    return Normalisation(values[0], values[1], source=source)
