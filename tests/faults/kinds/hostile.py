"""Hostile input: files of images, sets, tables and weights, class names, overrides.

Each file is read in a fork with 1 GiB of memory above the idle process and a limit of time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import random
import resource
import shutil
import struct
import sys
import tarfile
import typing
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.campaign import Kind, Lab, Verdict
from tests.faults.kinds.files import damage
from tests.faults.starts import Ended

KINDS: dict[str, Kind] = {}
SECONDS = 120  # of CPU in which a file must be read or refused
HOLDS = "holds: "  # begins the line with the digests of the images that were read


# ---- in the fork


def read(reader: str, path: str) -> None:
    """Reads a file with a bounded amount of memory and time; 0: read, 2: refused in one sentence."""
    from vit_scaling import UserError
    from vit_scaling.data.images.header import CorruptImageError

    # Memory of its own: files that are mapped to be read are not counted.
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmData:")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        print(f"{HOLDS}{READERS[reader](Path(path))}", file=sys.stderr)
    except (UserError, CorruptImageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if "\n" not in str(error) else 3)


def read_image(path: Path) -> str:
    from vit_scaling.data.images import codec

    image = codec.decode(path.read_bytes())
    assert image.dtype == np.uint8, image.dtype
    assert image.ndim == 3, image.shape
    return hashlib.sha256(image.tobytes()).hexdigest()


def read_set(path: Path) -> str:
    """Returns a digest of the images; those that are corrupt are left out."""
    from vit_scaling.data import sources
    from vit_scaling.data.images import codec
    from vit_scaling.data.images.header import CorruptImageError

    source = sources.open_source(sources.parse(str(path)))
    found = set()
    for index in range(len(source)):
        with contextlib.suppress(CorruptImageError):
            image = source[index]["image"]
            pixels = codec.decode(image) if isinstance(image, bytes) else image
            found.add(hashlib.sha256(pixels.tobytes()).hexdigest())
    return " ".join(sorted(found))


def read_weights(path: Path) -> str:
    from vit_scaling import interop

    interop.read(path)
    return ""


def read_run(path: Path) -> str:
    from vit_scaling.training import initial

    initial.read(path)
    return ""


def read_bytes(path: Path) -> str:
    """Takes as many bytes as the path says; tests try the limit with it."""
    return f"{len(bytearray(int(path.name)))}"


READERS: dict[str, Callable[[Path], str]] = {
    "image": read_image,
    "set": read_set,
    "weights": read_weights,
    "run": read_run,
    "bytes": read_bytes,
}


# ---- what is read


def picture(draw: random.Random, format: str) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (9, 11, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def chunk(name: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claiming_png(draw: random.Random) -> bytes:
    """A PNG of a few bytes that claims many pixels, or a chunk of gigabytes."""
    head = b"\x89PNG\r\n\x1a\n"
    if draw.random() < 0.5:
        return head + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**20, 2**20, 8, 2, 0, 0, 0))
    right = head + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return right + chunk(draw.choice((b"IDAT", b"iCCP", b"tEXt", b"zTXt")), b"abc", 0x7FFFFFF0)


def image(lab: Lab, draw: random.Random, path: Path) -> tuple[Path, str]:
    format = draw.choice(("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "claims"))
    path.mkdir()
    file = path / f"image.{format.lower()}"
    file.write_bytes(claiming_png(draw) if format == "claims" else picture(draw, format))
    return file, format


def tar(lab: Lab, draw: random.Random, path: Path) -> tuple[Path, str]:
    path.mkdir()
    with tarfile.open(path / "train-0.tar", "w") as file:
        for number in range(4):
            for ending, data in (("png", picture(draw, "PNG")), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return path / "train-0.tar", "tar"


def idx(lab: Lab, draw: random.Random, path: Path) -> tuple[Path, str]:
    path.mkdir()
    shape = draw.choice(((6, 5, 5), (6, 5, 5), (2**31, 28, 28), (0, 5, 5), (6, 0, 0)))
    head = struct.pack(">HBB3I", 0, 8, 3, *shape)
    (path / "train-images-idx3-ubyte").write_bytes(head + bytes(6 * 25))
    (path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 6) + bytes([0, 1] * 3))
    return path / draw.choice(("train-images-idx3-ubyte", "train-labels-idx1-ubyte")), f"IDX {shape}"


def csv(lab: Lab, draw: random.Random, path: Path) -> tuple[Path, str]:
    path.mkdir()
    (path / "a.png").write_bytes(picture(draw, "PNG"))
    (path / "b.png").write_bytes(picture(draw, "PNG"))
    rows = ["file,label", "a.png,cat", "b.png,dog"]
    bad = draw.choice(
        (
            "../../../etc/passwd,cat",
            "/etc/passwd,cat",
            "a.png",
            "a.png,cat,x,y",
            '"a.png,cat',
            "\0,cat",
            "a.png," + "x" * 200_000,
        )
    )
    if draw.random() < 0.6:
        rows.insert(draw.randrange(1, 4), bad)
    text = "\n".join(rows) + "\n"
    data = draw.choice(
        (text.encode(), text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\xff\xfe,x\n")
    )
    (path / "train.csv").write_bytes(data)
    return path / "train.csv", f"table, {bad[:20]!r}"


def weights(lab: Lab, draw: random.Random, path: Path) -> tuple[Path, str]:
    """A file of weights that was right before it was damaged."""
    layout = draw.choice(("vit_scaling", "timm", "huggingface"))
    folder = lab.folder / f"weights_{layout}"
    if not folder.exists():
        _write_weights(folder, layout)
    shutil.copytree(folder, path)
    return draw.choice(sorted(file for file in path.iterdir() if file.is_file())), layout


def _write_weights(folder: Path, layout: str) -> None:
    """Writes the weights of a tiny network in one of the layouts."""
    import jax

    from tests import tiny
    from vit_scaling import interop, models

    model = models.build(tiny.model(pool="gap"), image_size=(28, 28), num_classes=10, key=jax.random.key(0))
    interop.save(model, folder, layout=layout)


def parser(label: str, reader: str, make: Callable[..., tuple[Path, str]]) -> None:
    """Adds a kind: files for one parser, as made or damaged once more."""

    def fault(lab: Lab, draw: random.Random) -> Verdict:
        path, detail = make(lab, draw, lab.new())
        whole = str(path if reader == "image" else path.parent)
        # PNG has checksums: what is read from one that was damaged must be what was written.
        right = holds(lab.forks.start(read, reader, whole).wait(300)) if detail in ("PNG", "tar") else None
        how = draw.choice(("as made", "truncated", "emptied", "one bit flipped", "one bit flipped", "one bit flipped"))
        how = how if how == "as made" else damage(path, how, draw)
        ended = lab.forks.start(read, reader, whole).wait(300)
        verdict = verdict_of(ended, label, f"{detail}, {path.name} {how}")
        if verdict.answer == "equal" and right is not None and not holds(ended) <= right:
            return Verdict(label, verdict.detail, "lost", "other pixels than were written were read")
        return verdict

    KINDS[label] = fault


def holds(ended: Ended) -> set[str]:
    """Returns the digests of the images that a fork has read."""
    lines = [line for line in ended.error.splitlines() if line.startswith(HOLDS)]
    return set(lines[-1].removeprefix(HOLDS).split()) if lines else set()


def verdict_of(ended: Ended, label: str, detail: str) -> Verdict:
    if ended.code == 0:
        return Verdict(label, detail, "equal")
    said = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    if ended.code == 2 and len(said) == 1 and "\x1b" not in said[0]:
        return Verdict(label, detail, "refused", said[0][:300])
    return Verdict(label, detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")


parser("hostile image", "image", image)
parser("hostile tar", "set", tar)
parser("hostile IDX", "set", idx)
parser("hostile table", "set", csv)
parser("hostile weights", "weights", weights)

NAMES = (
    "$a^$",
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "<img src=x onerror=alert(1)>",
    "ü\u202eabc",
    " ",
    "a" * 200,
    "%s{}",
    "_",
    "☃",
)


def class_names(lab: Lab, draw: random.Random) -> Verdict:
    """A set whose classes have hostile names: the run ends, and no escape reaches the terminal."""
    folder, workdir, names = lab.new(), lab.new(), draw.sample(NAMES, 3)
    for split, count in (("train", 8), ("validation", 2)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                (folder / split / name / f"{number}.png").write_bytes(picture(draw, "PNG"))
    flags = ["--config.data.transform.crop=resize", "--config.data.eval_transform.crop=resize"]
    for field, split in (("data.train", "train"), ("evaluation.validation", "validation")):
        flags += [f"--config.{field}.kind=folder", f"--config.{field}.name={folder}", f"--config.{field}.split={split}"]
    ended = lab.start(workdir, *flags).wait()
    detail = repr(names)
    if "\x1b" in ended.error:
        return Verdict("hostile class names", detail, "lost", "an escape reached the terminal")
    if ended.code == 0 and (workdir / "result.json").exists():
        return Verdict("hostile class names", detail, "equal")
    return verdict_of(ended, "hostile class names", detail)


KINDS["hostile class names"] = class_names


# ---- overrides


@functools.cache
def numeric_fields() -> tuple[str, ...]:
    """Returns the names of all numeric fields of the small run's config."""
    from tests.faults.small import get_config

    found = []

    def walk(node: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value, name = getattr(node, field.name), f"{prefix}{field.name}"
            if dataclasses.is_dataclass(value):
                walk(value, f"{name}.")
            elif {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}:
                found.append(name)

    walk(get_config(), "")
    return tuple(found)


OTHERS = (
    *("model.patch=(0,0)", "data.transform.size=(100000,100000)", "optim.freeze=('[',)", "mesh.data=7"),
    *("evaluation.validation.split=nonesuch", "checkpoint.best=nonesuch", "schedule.kind=nonesuch", "seed=x"),
    *("init.path=/nonexistent/weights", "init.path=/dev/zero", "data.train.name=../..", "model.width=1000000000"),
)


def override(lab: Lab, draw: random.Random) -> Verdict:
    """Refused in one sentence, before anything is written; nan and inf in any field that is a number."""
    workdir, label = lab.new(), "hostile override"
    values = ("nan", "inf", "-inf", "-1000000000", "-1e300")
    chosen = draw.choice((draw.choice(OTHERS), *[f"{draw.choice(numeric_fields())}={draw.choice(values)}"] * 3))
    ended = lab.start(workdir, f"--config.{chosen}").wait()
    if ended.code != 2 or not ended.is_clear:
        return Verdict(label, chosen, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    if workdir.exists():
        return Verdict(label, chosen, "lost", "the workdir was written")
    return Verdict(label, chosen, "refused", ended.error.strip().splitlines()[-1])


KINDS["hostile override"] = override
