"""Measures the attention page of a large model: its size, how long it takes to open, and to move to another head.

    python benchmarks/pages.py [--images=8] [--model=S/16]

Writes the page of a ViT with random weights and noise as images, the hardest case to compress, into a temporary
folder, opens it in a headless Chromium (on PATH, or $CHROMIUM) with no network, and prints medians over 40 moves.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

from tests.pages.browser import Browser, find
from vit_scaling import interop, models, names
from vit_scaling.models import vit
from vit_scaling.pages import attention, images

# From the change of the choice until the next frame has been painted.
MOVE = """(async () => {
  const times = [];
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  for (let i = 0; i < 40; i++) {
    await frame();
    const start = performance.now();
    %s
    await frame();
    times.push(performance.now() - start);
  }
  return times;
})()"""
MOVES = {
    "another head": "document.querySelectorAll('.heads button')[(7 * i + 3) % 60].click();",
    "another image": "document.querySelectorAll('.thumbs button')[i % 2].click();",
    "another query": "document.querySelector('.stage').dispatchEvent(new KeyboardEvent('keydown',"
    " {key: i % 2 ? 'ArrowUp' : 'ArrowDown', bubbles: true}));",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--model", default="S/16")
    args = parser.parse_args()
    program = find()
    if program is None:
        sys.exit("there is no Chromium: install Debian's, or set CHROMIUM to the path of one")
    config, size = vit.variant(args.model, pool="token"), (224, 224)
    model = models.build(config, image_size=size, num_classes=1000, key=jax.random.key(0))
    leaves = {path: np.asarray(leaf) for path, leaf in names.flatten(models.split(model)[1]).items()}
    # Queries and keys three times as large make rows as uneven as those of trained networks.
    sharper = ("/query/kernel", "/key/kernel")
    leaves = {path: 3 * leaf if path.endswith(sharper) else leaf for path, leaf in leaves.items()}
    weights = interop.Weights(config, size, 1000, leaves, {}, "vit_scaling", False)
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, *size, 3), dtype=np.uint8)
    chosen = images.Images(pixels, [f"noise {i}" for i in range(args.images)], [None] * args.images, None, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        start = time.perf_counter()
        written = attention.write(weights, chosen, path, title=f"ViT-{args.model}")
        print(f"machine: {platform.platform()}, {os.cpu_count()} cores")
        seconds = time.perf_counter() - start
        print(f"{written.bytes / 1e6:.2f} MB, {written.images} images, written in {seconds:.1f} s")
        print(f"{written.levels} levels: each weight to within {100 * written.error:.2g}% of the largest")
        browser = Browser(program)
        try:
            start = time.perf_counter()
            browser.open(path)
            print(f"opened in {time.perf_counter() - start:.2f} s")
            for name, action in MOVES.items():
                times = browser.run(MOVE % action)
                print(f"{name}: {np.median(times):.1f} ms, at most {max(times):.1f} ms")
            print(f"errors: {browser.problems or 'none'}; requests: {browser.requests or 'none'}")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
