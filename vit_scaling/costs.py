"""Print what models cost for each image: parameters, FLOPs and activation memory.

    ./run.sh costs
    ./run.sh costs --config=configs/vit_imagenet.py:L/16 \\
        --config=configs/vit_jft.py:G/14

A multiply-add counts as 2 FLOPs, attention included; training is three times the forward pass (flops/cost.py states the
convention). Activations are what the backward pass keeps for one image under the config's own remat policy. The number
of classes is that of the config's training set.
"""

from collections.abc import Sequence

from absl import flags

from vit_scaling import UserError, cli
from vit_scaling.names import render_table

# Every model of configs/, at its published sizes.
PUBLISHED = {
    "vit_imagenet": ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16"),
    "deit3_imagenet": ("S", "B", "L", "H"),
    "vit_jft": ("g/14", "G/14"),
    "swin_imagenet": ("T", "S", "B", "L", "v2-T", "v2-S", "v2-B"),
    "resnet_imagenet": ("26", "38", "50", "101"),
    "sasa_imagenet": ("26", "38", "50", "50,stem=attention"),
    "aa_resnet_imagenet": ("50", "101"),
    "attention_cnn_cifar10": ("quadratic", "gaussian", "learned", "learned+query", "learned+content"),
}

_CONFIG = flags.DEFINE_multi_string("config", [], "A config, as for train; repeat it for more lines (default: all).")
_CLASSES = flags.DEFINE_integer("num_classes", None, "Length of the logits (default: the config's own).", 1)


def line(name: str, num_classes: int | None = None) -> tuple[str, ...]:
    """Returns one row of the table: the config `NAME[:ARGUMENT]`, its image size, and what its model costs.

    Raises:
        UserError: there is no such config, or it has no model or no known number of classes.
    """
    from vit_scaling import flops
    from vit_scaling.data.sources import known

    config = cli.load_config(name)
    if not hasattr(config, "model"):
        raise UserError(f"--config={name} has no model of its own; name the config of a single run")
    classes = num_classes or known.describe(config.data.train).num_classes
    if classes is None:
        raise UserError(f"the classes of {name} are unknown, as its training set is not here; give --num_classes")
    size = config.data.transform.size
    cost = flops.count(config.model, image_size=size, num_classes=classes)
    file, _, argument = name.partition(":")
    stem = file.rpartition("/")[2].removesuffix(".py")
    return (
        f"{stem}:{argument}" if argument else stem,
        f"{size[0]}x{size[1]}",
        f"{classes:,}",
        f"{cost.params:,}",
        f"{cost.forward_flops / 1e9:,.2f}",
        f"{cost.train_flops / 1e9:,.2f}",
        f"{cost.activation_bytes / 2**20:,.1f}",
    )


def main(argv: Sequence[str]) -> None:
    del argv
    names = _CONFIG.value or [f"{name}:{variant}" for name, variants in PUBLISHED.items() for variant in variants]
    header = ("model", "image", "classes", "parameters", "forward GFLOPs", "training GFLOPs", "activations, MiB")
    print(render_table(header, [line(name, _CLASSES.value) for name in names]))


if __name__ == "__main__":
    cli.run(main, __doc__)
