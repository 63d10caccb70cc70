"""What models cost: parameters, FLOPs and activation memory of one image, as a table, before anything is trained.

    python -m vit_scaling.costs
    python -m vit_scaling.costs --config=configs/vit_imagenet.py:L/16 --config=configs/vit_jft.py:G/14

A multiply-add counts as 2 FLOPs, attention's included; training is three times the forward pass; flops/cost.py has
the convention. Activations are what the backward pass keeps of one image, under the config's own remat.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_scaling import UserError, cli

# Every model of configs/, at its published sizes.
PUBLISHED = {
    "vit_imagenet": ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16"),
    "vit_jft": ("g/14", "G/14"),
    "swin_imagenet": ("T", "S", "B", "L", "v2-T", "v2-S", "v2-B"),
    "resnet_imagenet": ("26", "38", "50", "101"),
    "sasa_imagenet": ("26", "38", "50", "50,stem=attention"),
    "aa_resnet_imagenet": ("50", "101"),
    "attention_cnn_cifar10": ("quadratic", "gaussian", "learned", "learned+query", "learned+content"),
}

_CONFIG = flags.DEFINE_multi_string(
    "config",
    [f"configs/{name}.py:{variant}" for name, variants in PUBLISHED.items() for variant in variants],
    "FILE.py[:ARGUMENT], as for train; give it again for more lines.",
)
_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Length of the logits.", lower_bound=1)


def line(name: str, num_classes: int) -> tuple[str, ...]:
    """Returns one row of the table: the experiment `FILE.py[:ARGUMENT]`, its image, and what its model costs.

    Raises:
        UserError: the file is no experiment's, or has no such variant.
    """
    from vit_scaling import flops

    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UserError(f"there is no config file {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = module.get_config(argument)
    if not hasattr(experiment, "model"):
        raise UserError(f"{file} has no model of its own; name a single experiment's file")
    size = experiment.data.transform.size
    cost = flops.count(experiment.model, image_size=size, num_classes=num_classes)
    return (
        f"{Path(file).stem}:{argument}" if argument else Path(file).stem,
        f"{size[0]}x{size[1]}",
        f"{cost.params:,}",
        f"{cost.forward_flops / 1e9:,.2f}",
        f"{cost.train_flops / 1e9:,.2f}",
        f"{cost.activation_bytes / 2**20:,.1f}",
    )


def main(argv: Sequence[str]) -> None:
    del argv
    header = ("model", "image", "parameters", "forward GFLOPs", "training GFLOPs", "activations, MiB")
    rows = [header, *(line(name, _CLASSES.value) for name in _CONFIG.value)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))


if __name__ == "__main__":
    cli.run(main, __doc__)
