"""Images per second and per core of the input pipeline, with tf.data and torch on the same files in the same run.

    pip install tensorflow-cpu torch scikit-image
    python benchmarks/input.py              throughput: decode, inception crop to 224, flip, batch
    python benchmarks/input.py --memory     memory of the loader over 20,000 steps
    python benchmarks/input.py --before=../old    also the pipeline of another checkout of this project, and the ratio

The files are JPEGs of 500 x 375 (4:2:0), cut from photographs that scikit-learn and scikit-image carry. Each has eight
names, so that there are as many records to shuffle and look up as in a small pretraining set.
Every pipeline reads them from disk with one thread in a process of its own, bound to the same core. They take turns of
a hundred images, and the measure is each process's CPU time, with all of its threads and all that it prefetches, so
other load on the machine matters little. A peer that is not installed is left out.

    bare          libjpeg-turbo (simplejpeg, fast DCT) and OpenCV's resize of a fixed central crop: nothing else
    vit_scaling   a folder source, the loader and the transforms of this project; once from the same files as a TFDS
                  data set, which the benchmark builds with TFDS's own tools
    tf.data       big_vision's decode_jpeg_and_inception_crop(224)|flip_lr|value_range(-1, 1), which returns float32;
                  and the same without the last step, as we apply it on the device
    torch         DataLoader, Pillow's draft decode, crop, bilinear resize and flip
"""

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import numpy as np
import simplejpeg

from vit_scaling.data import loader, sources
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images import transforms

ROOT = Path(__file__).resolve().parent.parent
BATCH = 50
PHOTOGRAPHS, NAMES = 2400, 8
Pipeline = Callable[[], object]  # makes one batch


def write_photographs(folder: Path, count: int, quality: int, names: int = 1) -> list[Path]:
    """Cuts `count` JPEGs of 500 x 375 from the photographs of scikit-learn and scikit-image, in four classes.

    Returns the paths: each file is linked under `names` of them.
    """
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [*load_sample_images().images]
    photographs += [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[:2]
        h = int(min(height, width * 3 / 4) * rng.uniform(0.7, 1))
        w = h * 4 // 3
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        image = cv2.resize(photograph[top : top + h, left : left + w], (500, 375), interpolation=cv2.INTER_CUBIC)
        path = folder / "files" / "all" / str(number % 4) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="420"))
        paths.append(path)
        for name in range(1, names):
            paths.append(path.with_name(f"{number:04d}_{name}.jpg"))
            paths[-1].hardlink_to(path)
    return paths


def write_tfds(folder: Path, paths: list[Path]) -> None:
    """Writes the same files as a TFDS data set called photographs, with TFDS's own builder, as ArrayRecord."""
    import tensorflow_datasets as tfds

    class Photographs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012 (nothing to download)

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=4)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for path in paths:
                yield path.name, {"image": path.read_bytes(), "label": int(path.parent.name)}

    Photographs(data_dir=str(folder), file_format="array_record").download_and_prepare()


def ours(config: sources.SourceConfig, **fields) -> Pipeline:
    source = sources.open_source(config)
    transform = transforms.transform(transforms.TransformConfig(crop="inception", flip=0.5, **fields), train=True)
    data = DataConfig(batch_size=BATCH, threads=1, prefetch=1)
    batches = loader.train_batches(source, transform, data, seed=0)
    return lambda: next(batches)


def bare(paths: list[Path]) -> Pipeline:
    def read(path: Path) -> np.ndarray:
        image = simplejpeg.decode_jpeg(path.read_bytes(), fastdct=True, fastupsample=True)
        return cv2.resize(image[37:337, 50:450], (224, 224))

    endless = cycle(paths)
    return lambda: [read(next(endless)) for _ in range(BATCH)]


def tf_data(paths: list[Path], value_range: bool) -> Pipeline:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def read(path):
        data = tf.io.read_file(path)
        shape = tf.image.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.05, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.cast(tf.image.resize(image, (224, 224), "bilinear"), tf.uint8)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(image, tf.float32) / 127.5 - 1.0 if value_range else image

    data = tf.data.Dataset.from_tensor_slices([str(path) for path in paths]).shuffle(len(paths)).repeat()
    data = data.map(read, num_parallel_calls=1).batch(BATCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    batches = data.with_options(options).as_numpy_iterator()
    return lambda: next(batches)


def torch_pillow(paths: list[Path]) -> Pipeline:
    import torch
    from PIL import Image

    torch.set_num_threads(1)

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            rng = np.random.default_rng()
            with Image.open(paths[index]) as image:
                top, left, height, width = transforms.inception_box_torchvision(
                    image.height, image.width, (0.05, 1.0), (3 / 4, 4 / 3), rng
                )
                image = image.convert("RGB").resize(
                    (224, 224), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
                )
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image))

    data = torch.utils.data.DataLoader(Photographs(), batch_size=BATCH, shuffle=True, drop_last=True)
    batches = cycle(data)
    return lambda: next(batches)


def cycle(items) -> Iterator:
    while True:
        yield from items


def pipeline(name: str, folder: Path) -> Pipeline:
    paths = sorted((folder / "files").rglob("*.jpg"))
    files = sources.SourceConfig("folder", str(folder / "files"), "all")
    tfds = sources.SourceConfig("tfds", "photographs", "train", str(folder / "tfds"))
    make: dict[str, Callable[[], Pipeline]] = {
        "bare": lambda: bare(paths),
        "vit_scaling": lambda: ours(files),
        "vit_scaling from TFDS": lambda: ours(tfds),
        "vit_scaling, antialias": lambda: ours(files, resize="antialias"),
        "vit_scaling + RandAugment(2,10)": lambda: ours(files, randaugment="big_vision"),
        "tf.data": lambda: tf_data(paths, value_range=True),
        "tf.data, uint8": lambda: tf_data(paths, value_range=False),
        "torch + Pillow": lambda: torch_pillow(paths),
    }
    return make[name]()


def take_turns(name: str, folder: Path) -> None:
    """A pipeline's process: for every number that comes in, makes so many batches and says its CPU time so far."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    make = pipeline(name, folder)
    for line in sys.stdin:
        for _ in range(int(line)):
            make()
        print("CPU", time.process_time(), flush=True)


class Turns:
    """One pipeline's process, seen from outside."""

    def __init__(self, name: str, folder: Path, root: Path):
        command = [sys.executable, str(root / "benchmarks" / "input.py"), "--pipeline", name, "--folder", str(folder)]
        there = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=there, cwd=root
        )
        self._seconds = 0.0
        self.turn(3)

    def turn(self, batches: int) -> float:
        """Returns the CPU seconds since the turn before."""
        assert self._process.stdin
        assert self._process.stdout
        print(batches, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("CPU "):
                before, self._seconds = self._seconds, float(line.split()[1])
                return self._seconds - before
        raise RuntimeError("a pipeline's process died")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure_throughput(rounds: int, images: int, quality: int, before: Path | None) -> None:
    names = [
        "bare",
        "vit_scaling",
        "vit_scaling from TFDS",
        "vit_scaling, antialias",
        "vit_scaling + RandAugment(2,10)",
    ]
    names += ["tf.data", "tf.data, uint8"] if importlib.util.find_spec("tensorflow") else []
    names += ["torch + Pillow"] if importlib.util.find_spec("torch") else []
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_photographs(Path(temporary), PHOTOGRAPHS, quality, NAMES)
        write_tfds(Path(temporary) / "tfds", paths)
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(
            f"{PHOTOGRAPHS} JPEGs of 500 x 375, {size / 1000:.0f} kB each, under {NAMES} names each; one core; "
            f"{rounds} turns of {images} images"
        )
        turns = {name: Turns(name, Path(temporary), ROOT) for name in names}
        if before is not None:
            names.append("before")
            turns["before"] = Turns("vit_scaling", Path(temporary), before.resolve())
        seconds = np.empty((rounds, len(names)))
        for row in range(rounds):
            # Pipelines with one seed read the same files: the later one finds them in the processor's caches.
            for column in range(len(names))[:: 1 if row % 2 else -1]:
                seconds[row, column] = turns[names[column]].turn(images // BATCH) / images
        for turn in turns.values():
            turn.close()
    rates = dict(zip(names, 1 / seconds.mean(0), strict=True))
    for name, values in zip(names, seconds.T, strict=True):
        low, high = 1 / np.quantile(values, [0.9, 0.1])
        print(f"{name:34s} {rates[name]:6.0f} images/s per core (turns, 10 to 90%: {low:.0f} to {high:.0f})")
    rand = 1e6 * (1 / rates["vit_scaling + RandAugment(2,10)"] - 1 / rates["vit_scaling"])
    print(f"RandAugment(2,10): {rand:.0f} us per image")
    for peer in ("bare", "tf.data", "tf.data, uint8", "torch + Pillow", "before"):
        if peer in rates:
            print(f"vit_scaling against {peer}: {rates['vit_scaling'] / rates[peer]:.2f}")


def measure_memory(steps: int) -> None:
    """Resident memory of the loader while it reads `steps` batches of small JPEGs, threads and all."""
    with tempfile.TemporaryDirectory() as temporary:
        for path in write_photographs(Path(temporary), 60, 92):
            image = cv2.resize(simplejpeg.decode_jpeg(path.read_bytes()), (80, 60))
            path.write_bytes(simplejpeg.encode_jpeg(image))
        source = sources.open_source(sources.SourceConfig("folder", f"{temporary}/files", "all"))
        config = transforms.TransformConfig(
            (32, 32), flip=0.5, randaugment="big_vision", erase=0.25, jitter=(0.4, 0.4, 0.4, 0)
        )
        transform = transforms.transform(config, train=True)
        batches = loader.train_batches(source, transform, DataConfig(batch_size=8, threads=2), seed=0)
        page = os.sysconf("SC_PAGESIZE")
        readings = []
        for step in range(1, steps + 1):
            next(batches)
            if step % (steps // 10) == 0:
                readings.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6)
                print(f"step {step:6d}: {readings[-1]:.1f} MB")
        batches.close()
    print(f"growth from step {steps // 10} to {steps}: {100 * (readings[-1] / readings[0] - 1):+.2f}%")
    print(f"peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory, not throughput")
    parser.add_argument("--before", type=Path, help="another checkout of this project, to compare with")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--images", type=int, default=100, help="images in a turn")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEG files")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--pipeline", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pipeline:
        take_turns(arguments.pipeline, arguments.folder)
    elif arguments.memory:
        measure_memory(arguments.steps)
    else:
        measure_throughput(arguments.rounds, arguments.images, arguments.quality, arguments.before)
