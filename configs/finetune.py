"""Fine-tune weights on an own set or a public one, as Scaling Vision Transformers does (appendix D).

    ./run.sh train --config=configs/finetune.py:weights/vit_b16,/data/birds --workdir=runs/birds
    ./run.sh train --config=configs/finetune.py:weights/vit_b16,cifar10 --workdir=runs/b16_cifar10
    ./run.sh train --config=configs/finetune.py:runs/smoke,digits,res=42 --workdir=runs/digits_42
    ./run.sh train --config=configs/finetune.py:B/16,pets,res=512x384 --workdir=runs/pets \\
        --config.init.path=weights/B_16.npz

The first word is a weight file or folder, a checkpoint or a run, from which the network is read too, or a size such as
B/16. The second is a set:

    PATH or KIND:NAME      an own set: a folder of class folders, a folder with tables of labels, a set that `prepare`
                           wrote, tfds:NAME. Splits called train, val and test are used; a tenth is held out by class
                           where there is no validation split. Batch size, steps and warmup follow from the number of
                           images, and the command prints why
    imagenet, cifar10, cifar100, pets, flowers (TFDS) or digits (built in), with the published number of steps

Then, in any order:

    res=384, res=512x384   height and width in pixels (default: 384, of an own set the weights' own); the weights are
                           adapted
    crop=random            resize to 448/384 of the resolution, then a random window (the default of a square), or
    crop=inception         a random part of the image, stretched (the default of a rectangle)
    flat                   constant learning rate and a Polyak average, for the largest models, instead of cosine
    probe                  the classifier alone is trained
    smoke                  seconds on the built-in digits

Recipe:   SGD, momentum 0.9 in bfloat16, batch 512, clip 1, no weight decay, fresh zero classifier, 500 warmup steps.
          The learning rate, 0.03 or 0.01, is for `transfer_sweep.py` to choose, on the last 2% of the training set.
          An own set gets BiT's number of images (arXiv 1912.11370: 500 steps of 512 below 20,000 images, 10,000 below
          500,000, else 20,000), but at most 50 epochs, in batches of at least 20 an epoch.
          SoViT's fine-tuning adds --config.optim.layer_decay=0.9 (arXiv 2305.13035, table 8).
Expected: ViT-B/32 AugReg (ImageNet-21k): ImageNet 83.3%, CIFAR-10 98.6%, CIFAR-100 91.4%, Pets 93.8%, Flowers 99.4%, as
          published.
Run by us: digits, see docs/finetuning.md; the rest `smoke` only.
"""

import dataclasses

from vit_scaling import UserError, interop
from vit_scaling import config as c
from vit_scaling.data import own
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.interop import hub
from vit_scaling.models import ModelConfig, vit

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
    if len(words) < 2:
        raise UserError(f"write finetune.py:MODEL,DATA with DATA a folder or one of {', '.join(DATA)}; this is {arg!r}")
    settings = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    flags = [word for word in words[2:] if "=" not in word]
    if unknown := [*(settings.keys() - {"res", "crop"}), *(set(flags) - set(WORDS))]:
        raise UserError(f"finetune.py takes no {unknown[0]!r}; it takes res=384, crop=inception, {', '.join(WORDS)}")
    path, model, own_size = _model(words[0])
    data = _data(words[1])
    size = own_size if data.own and own_size else (384, 384)
    size = c.image_size("finetune.py's res", settings["res"]) if "res" in settings else size
    # A window cut from a square would see less of an image than the whole one that is evaluated, stretched.
    crop = settings.get("crop", "random" if size[0] == size[1] else "inception")
    if crop not in CROPS:
        raise UserError(f"finetune.py's crop is {crop!r}; choose one of {', '.join(CROPS)}")
    resize_to = max(size) * 448 // 384
    config = c.Config(
        model=model,
        data=DataConfig(
            train=data.train,
            transform=TransformConfig(size=size, crop=crop, resize_to=resize_to, flip=data.flip),
            eval_transform=TransformConfig(size=size, crop="resize"),
            mixing=MixingConfig(),
            batch_size=data.batch_size,
            workers=data.workers,
        ),
        duration=c.Duration(data.steps),
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
            kind="constant" if "flat" in flags else "cosine", warmup=c.Duration(data.warmup), cooldown=c.Duration(0)
        ),
        init=c.InitConfig(path=path),
        evaluation=c.EvaluationConfig(every=c.Duration(data.steps // 10), validation=data.validation, test=data.test),
        checkpoint=c.CheckpointConfig(every=c.Duration(data.steps // 10), best="validation/accuracy"),
    )
    if not smoke:
        return config
    small = c.smoke(config, vit.variant("mu/7"))
    small.init = c.InitConfig()
    return small


@dataclasses.dataclass(frozen=True)
class _Data:
    """A set and the sizes of a run on it."""

    train: SourceConfig
    validation: SourceConfig
    test: SourceConfig | None
    batch_size: int
    steps: int
    warmup: int
    workers: int
    flip: float = 0.5
    own: bool = False


def _data(name: str) -> _Data:
    if name in DATA:
        kind, builder, train, held_out, test, steps, warmup = DATA[name]
        parts = [SourceConfig(kind, builder, split) for split in (train, held_out, test)]
        if name == "digits":
            return _Data(*parts, 64, steps, warmup, workers=0, flip=0.0)  # a digit has no mirror image
        return _Data(*parts, 512, steps, warmup, workers=8)
    found = own.find(name)
    bit = 500 if found.images < 20_000 else 10_000 if found.images < 500_000 else 20_000
    sizes = own.sizes(found.images, min(bit * 512 / found.images, 50), most=512)
    return _Data(found.train, found.validation, found.test, own=True, **dataclasses.asdict(sizes))


def _model(name: str) -> tuple[str | None, ModelConfig, tuple[int, int] | None]:
    """Returns (weights, model, image size) of what lies there; else (None, a ViT of that size, None)."""
    if not hub.place(name).exists():
        try:
            return None, vit.variant(name), None
        except UserError as error:
            raise UserError(f"there is no file or folder {name}, and as a ViT size: {error}") from None
    model, size, _ = interop.describe(name)
    model.drop_path = 0.0  # type: ignore[union-attr]
    return name, model, size
