"""Look inside a model, compare runs, or see what a network is fed: each is one HTML file that works offline.

    ./run.sh explore --weights=runs/smoke --output=attention.html
    ./run.sh explore --weights=weights/vit_b16 --images=PHOTOS \\
        --output=attention.html
    ./run.sh explore --weights=runs/heads --checkpoints=all --output=heads.html
    ./run.sh explore --compare runs/a runs/b --output=comparison.html
    ./run.sh explore --fed=runs/smoke --steps=0,1000 --output=fed.html
    ./run.sh explore --fed=runs/smoke --steps=0,1000 --seed=7 --output=fed7.html

Weights are a run, a checkpoint, or a weight file or folder of any layout. Without --images a run's own test set is
shown, else the built-in digits. --fed writes the training images of some steps before and after mixing, as the run sees
them or as a run with another --seed would, and the same as PNG beside the page. Every run writes its own report.html
while it trains.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_scaling import UserError, cli, paths

_WEIGHTS = flags.DEFINE(
    cli.PathParser(bucket=True, hub=True), "weights", None, "Run, checkpoint, weight file or folder to look inside."
)
_IMAGES = flags.DEFINE_string(
    "images", None, "Folder of images, builtin, or KIND:NAME:SPLIT such as builtin:mnist:test."
)
_COUNT = flags.DEFINE_integer("count", 8, "Images to show, the first ones.", 1)
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "Adapt the weights to this size, HEIGHTxWIDTH or one number.")
_EMA = flags.DEFINE_bool("ema", False, "Of a run: its average of the parameters.")
_CHECKPOINTS = flags.DEFINE_enum(
    "checkpoints", "last", ["last", "all"], "Of an attention-CNN's run: all shows how its heads moved."
)
_COMPARE = flags.DEFINE_multi(
    cli.PathParser(bucket=True), flags.ArgumentSerializer(), "compare", [], "Runs to compare: --compare RUN RUN ..."
)
_FED = flags.DEFINE(cli.PathParser(bucket=True), "fed", None, "Run whose augmented training images are shown.")
_STEPS = flags.DEFINE_list("steps", ["0"], "Of --fed: the steps.")
_SEED = flags.DEFINE_integer("seed", None, "Of --fed: the seed, where it is not the run's own.", 0)
_OUTPUT = flags.DEFINE(cli.PathParser(bucket=True), "output", None, "HTML file to write.", required=True)
# Which flags each mode reads.
_READS: dict[str, tuple[flags.FlagHolder[Any], ...]] = {
    "--weights": (_IMAGES, _COUNT, _IMAGE_SIZE, _EMA, _CHECKPOINTS),
    "--compare": (),
    "--fed": (_COUNT, _STEPS, _SEED),
}


def main(argv: Sequence[str]) -> None:
    del argv
    modes = {"--weights": _WEIGHTS.value, "--compare": _COMPARE.value, "--fed": _FED.value}
    if len(given := [name for name, value in modes.items() if value]) != 1:
        raise UserError(f"give one of {', '.join(modes)}; {' and '.join(given) or 'none of them'} is given")
    unread = {flag.name for read in _READS.values() for flag in read} - {flag.name for flag in _READS[given[0]]}
    if ignored := sorted(f"--{name}" for name in unread if flags.FLAGS[name].present):
        raise UserError(f"{given[0]} does not read {' and '.join(ignored)}; leave that out")
    output = paths.place(_OUTPUT.value)
    if output.suffix != ".html":
        raise UserError(f"--output is {str(output)!r}; name a file that ends in .html")
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling import config as config_lib

    if _COMPARE.value:
        from vit_scaling.pages import report

        if len(_COMPARE.value) < 2:
            raise UserError("--compare needs at least two runs, as in --compare runs/a runs/b")
        report.compare([paths.place(run) for run in _COMPARE.value], output)
        print(f"comparison of {len(_COMPARE.value)} runs: {output}")
        return
    if _FED.value:
        from vit_scaling.pages import fed

        if wrong := [step for step in _STEPS.value if not step.isdigit()]:
            raise UserError(f"--steps has {wrong[0]!r}; give steps as whole numbers, such as 0,1000")
        steps = [int(step) for step in _STEPS.value]
        picture = fed.write(paths.place(_FED.value), steps, _COUNT.value, output, seed=_SEED.value)
        print(f"page:    {output}\npicture: {picture}")
        return
    from vit_scaling.pages import attention

    size = None if _IMAGE_SIZE.value is None else config_lib.image_size("--image_size", _IMAGE_SIZE.value)
    written = attention.explore(
        str(_WEIGHTS.value),
        _IMAGES.value,
        output,
        count=_COUNT.value,
        size=size,
        ema=_EMA.value,
        all_steps=_CHECKPOINTS.value == "all",
    )
    if written.images < written.of:
        most = f"{attention.MOST_BYTES / 1e6:.1f} MB"
        print(f"shown: {written.images} of {written.of} images; more would make the page larger than {most}")
    print(f"drawn in {written.levels} steps: each weight to within {100 * written.error:.2g}% of its row's largest")
    print(f"page: {output} ({written.bytes / 1e6:.1f} MB)")


def joined(argv: Sequence[str]) -> list[str]:
    """Returns the command line in which `--compare A B` is `--compare=A --compare=B`."""
    words: list[str] = []
    comparing = False
    for word in argv:
        if word.startswith("-"):
            comparing = word.lstrip("-") == "compare"
            words += [] if comparing else [word]
        else:
            words.append(f"--compare={word}" if comparing else word)
    return words


if __name__ == "__main__":
    sys.argv = joined(sys.argv)
    cli.run(main, __doc__)
