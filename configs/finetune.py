"""Fine-tune published weights, or weights of ours, as Scaling Vision Transformers does (appendix D).

    python -m vit_scaling.train --config=configs/finetune.py:weights/vit_b16,cifar10 --workdir=runs/b16_cifar10
    python -m vit_scaling.train --config=configs/finetune.py:runs/smoke,digits,res=42 --workdir=runs/digits_42
    python -m vit_scaling.train --config=configs/finetune.py:B/16,pets,res=512x384 --workdir=runs/pets \
        --config.init.path=weights/B_16.npz

The first word is a weight file or folder, a checkpoint or a run, from which the network is read too, or a size such as
B/16. The second is a data set: imagenet, cifar10, cifar100, pets, flowers (TFDS) or digits (built in). Then, in any
order:

    res=384, res=512x384   height and width in pixels (default: 384); the weights are adapted
    crop=random            resize to 448/384 of the resolution, then a random window (the default of a square), or
    crop=inception         a random part of the image, stretched (the default of a rectangle)
    flat                   constant learning rate and a Polyak average, for the largest models, instead of cosine
    probe                  the classifier alone is trained
    smoke                  seconds on the built-in digits

Recipe:   SGD, momentum 0.9 in bfloat16, batch 512, clip 1, no weight decay, fresh zero classifier, 500 warmup steps.
          The learning rate, 0.03 or 0.01, is for `transfer_sweep.py` to choose, on the last 2% of the training set.
          SoViT's fine-tuning adds --config.optim.layer_decay=0.9 (arXiv 2305.13035, table 8).
Expected: ViT-B/32 AugReg (ImageNet-21k): ImageNet 83.3%, CIFAR-10 98.6%, CIFAR-100 91.4%, Pets 93.8%, Flowers 99.4%, as
          published.
Run by us: digits, see docs/finetuning.md; the rest `smoke` only.
"""

import functools
import os

from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import ModelConfig, vit
from vit_scaling.training import initial

# Source, training split, held-out part of it, test split, steps and warmup (big_vision's transfer recipe).
DATA = {
    "imagenet": ("tfds", "imagenet2012", "train[:98%]", "train[98%:]", "validation", 20_000, 500),
    "cifar10": ("tfds", "cifar10", "train[:98%]", "train[98%:]", "test", 10_000, 500),
    "cifar100": ("tfds", "cifar100", "train[:98%]", "train[98%:]", "test", 10_000, 500),
    "pets": ("tfds", "oxford_iiit_pet", "train[:98%]", "train[98%:]", "test", 500, 100),
    "flowers": ("tfds", "oxford_flowers102", "train", "validation", "test", 500, 100),
    "digits": ("builtin", "mnist", "train", "validation", "test", 500, 50),
}
WORDS = ("flat", "probe")
CROPS = ("random", "inception")


def get_config(arg: str | None = None) -> c.Config:
    """Takes model,data[,res=HxW][,crop=KIND][,flat][,probe][,smoke]."""
    words = [word for word in (arg or "B/16,cifar10").split(",") if word != "smoke"]
    smoke = len(words) < len((arg or "B/16,cifar10").split(","))
    if len(words) < 2 or words[1] not in DATA:
        raise UserError(f"write finetune.py:MODEL,DATA with DATA one of {', '.join(DATA)}; this is {arg!r}")
    kind, name, train, held_out, test, steps, warmup = DATA[words[1]]
    settings = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    flags = [word for word in words[2:] if "=" not in word]
    if unknown := [*(settings.keys() - {"res", "crop"}), *(set(flags) - set(WORDS))]:
        raise UserError(f"finetune.py takes no {unknown[0]!r}; it takes res=384, crop=inception, {', '.join(WORDS)}")
    size = c.image_size("finetune.py's res", settings.get("res", "384"))
    # A window cut from a square would see less of an image than the whole one that is evaluated, stretched.
    crop = settings.get("crop", "random" if size[0] == size[1] else "inception")
    if crop not in CROPS:
        raise UserError(f"finetune.py's crop is {crop!r}; choose one of {', '.join(CROPS)}")

    path, model = _model(words[0])
    source = functools.partial(SourceConfig, kind, name)
    digits = words[1] == "digits"
    batch_size = 64 if digits else 512
    flip = 0.0 if digits else 0.5  # a digit has no mirror image
    resize_to = max(size) * 448 // 384
    config = c.Config(
        model=model,
        data=DataConfig(
            train=source(train),
            transform=TransformConfig(size=size, crop=crop, resize_to=resize_to, flip=flip),
            eval_transform=TransformConfig(size=size, crop="resize"),
            mixing=MixingConfig(),
            batch_size=batch_size,
            workers=0 if digits else 8,
        ),
        duration=c.Duration(steps),
        optim=c.OptimConfig(
            name="sgd",
            lr=0.03,
            weight_decay=0.0,
            head_weight_decay=0.0,
            clip=1.0,
            freeze=(r"(?!head/).*",) if "probe" in flags else (),
            ema=0.9999 if "flat" in flags else None,
        ),
        schedule=c.ScheduleConfig(
            kind="constant" if "flat" in flags else "cosine", warmup=c.Duration(warmup), cooldown=c.Duration(0)
        ),
        init=c.InitConfig(path=path),
        evaluation=c.EvaluationConfig(every=c.Duration(steps // 10), validation=source(held_out), test=source(test)),
        checkpoint=c.CheckpointConfig(every=c.Duration(steps // 10), best="validation/accuracy"),
    )
    if not smoke:
        return config
    small = c.smoke(config, vit.variant("mu/7"))
    small.init = c.InitConfig()
    return small


def _model(name: str) -> tuple[str | None, ModelConfig]:
    """Returns (weights, model) of what lies there; else (None, a ViT of that size), for --config.init.path."""
    if not os.path.exists(name):
        return None, vit.variant(name)
    model = initial.describe(name)[0]
    model.drop_path = 0.0  # type: ignore[union-attr]
    return name, model
