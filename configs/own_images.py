"""Train a ViT from random weights on an own set of images. A tutorial, from a folder to predictions.

    ./run.sh train --config=configs/own_images.py:/data/birds --workdir=runs/birds

1. Put the images into one folder for each class: /data/birds/robin/1.jpg, /data/birds/wren/... JPEG, PNG, WebP and
   what Pillow reads; see what would be read with `./run.sh prepare --input=/data/birds --list`. Splits are folders
   called train, val and test around the class folders; without them a tenth of each class is held out.
2. Look at the experiment before it runs: the command above with --print_config. It prints the splits, and the batch
   size, steps and warmup that follow from the number of images.
3. Train: the command above. Ctrl-C saves; the same command continues. --config.data.on_corrupt=skip leaves out and
   names what cannot be decoded. The names of the classes are kept in runs/birds/config.json.
4. Evaluate:   ./run.sh evaluate --weights=runs/birds --output=runs/birds/evaluation
   Predict:    ./run.sh predict --weights=runs/birds new_photo.jpg
   Export:     ./run.sh weights export --input=runs/birds --output=birds_timm --layout=timm

Fewer than some 50,000 images hardly train a ViT from random weights: `configs/finetune.py:WEIGHTS,/data/birds` starts
from published ones and nearly always wins.

The first word is the set: a folder, a set that `prepare` wrote, or KIND:NAME such as tfds:cifar10. Then, in any order:

    model=S/16        a ViT's size and patch (default), also mu/4 for small images
    res=224           height and width in pixels (default), or HEIGHTxWIDTH
    epochs=90         how often each image is seen (default: 90, at most 90 million images)
    smoke             seconds on the built-in digits

Recipe:   that of vit_imagenet.py ("Better plain ViT baselines", arXiv 2205.01580) in float32 without few-shot
          evaluation; batch at most 1024, learning rate 1e-3 at that batch, less in proportion to its root.
Run by us: Debian's openclipart-png, see docs/data.md.
"""

from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.data import own
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.models import vit


def get_config(arg: str | None = None) -> c.Config:
    """Takes PATH[,model=S/16][,res=HxW][,epochs=90][,smoke]."""
    words = [word for word in (arg or "builtin:mnist,model=mu/7,res=28").split(",") if word]
    smoke = "smoke" in words
    words = [word for word in words if word != "smoke"] or ["builtin:mnist"]
    settings = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if unknown := [*(word for word in words[1:] if "=" not in word), *(settings.keys() - {"model", "res", "epochs"})]:
        raise UserError(f"own_images.py takes no {unknown[0]!r}; it takes model=S/16, res=224, epochs=90 and smoke")
    size = c.image_size("own_images.py's res", settings.get("res", "224"))
    found = own.find(words[0])
    try:
        asked = float(settings["epochs"]) if "epochs" in settings else None
    except ValueError:
        raise UserError(f"own_images.py's epochs is {settings['epochs']!r}; give a positive number") from None
    default = min(90, 90_000_000 / found.images)
    sizes = own.sizes(
        found.images, default if asked is None else asked, most=1024, least_steps=100 if asked is None else 1
    )
    every = c.Duration(max(sizes.steps // 20, 1))
    config = c.Config(
        model=vit.variant(settings.get("model", "S/16"), pool="gap", position="sincos2d"),
        data=DataConfig(
            train=found.train,
            transform=TransformConfig(size=size, crop="inception", flip=0.5, randaugment="big_vision"),
            eval_transform=TransformConfig(size=size, resize_to=max(size) * 256 // 224, crop="central", resize="area"),
            mixing=MixingConfig(mixup=0.2),
            batch_size=sizes.batch_size,
            workers=sizes.workers,
        ),
        duration=c.Duration(sizes.steps),
        optim=c.OptimConfig(
            name="adam",
            lr=1e-3 * (sizes.batch_size / 1024) ** 0.5,
            weight_decay=0.1,
            head_weight_decay=0.1,
            clip=1.0,
        ),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(sizes.warmup), cooldown=c.Duration(0)),
        evaluation=c.EvaluationConfig(every=every, validation=found.validation, test=found.test),
        checkpoint=c.CheckpointConfig(every=every, best="validation/accuracy"),
    )
    return c.smoke(config, vit.variant("mu/7", pool="gap", position="sincos2d")) if smoke else config
