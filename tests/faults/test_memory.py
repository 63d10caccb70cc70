"""Hostile files take little memory: each parser reads or refuses its file within 1 GiB above the idle process."""

import gzip
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.kinds import hostile

GIGABYTES = 3 << 30  # of files that have holes and take no space on the disk


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> campaign.Lab:
    return campaign.Lab(tmp_path_factory.mktemp("memory"))


def with_hole(path: Path, head: bytes, size: int = GIGABYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return path


def png(width: int, height: int, data: bytes) -> bytes:
    head = hostile.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + head + hostile.chunk(b"IDAT", data) + hostile.chunk(b"IEND", b"")


def png_of_many_pixels(folder: Path) -> Path:
    """A right PNG of 300 kB whose 576 million pixels take 1.7 GB."""
    side = 24_000
    (folder / "a.png").write_bytes(png(side, side, zlib.compress(bytes(side * (1 + side // 8)), 1)))
    return folder / "a.png"


def png_that_inflates(folder: Path) -> Path:
    """The header says 8 x 8, the compressed data hold 512 MB, and so does a text."""
    bomb = zlib.compress(bytes(512 << 20), 1)
    image = png(8, 8, bomb)
    text = hostile.chunk(b"zTXt", b"Comment\0\0" + bomb)
    (folder / "a.png").write_bytes(image[:-12] + text * 3 + image[-12:])
    return folder / "a.png"


def claims(name: str, head: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(head)
        return folder / name

    return make


def jpeg_of_many_pixels(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (16, 16)).save(folder / "a.jpg")
    data = (folder / "a.jpg").read_bytes()
    at = data.index(b"\xff\xc0") + 5  # of the height in the frame's header
    (folder / "a.jpg").write_bytes(data[:at] + struct.pack(">HH", 65_500, 65_500) + data[at + 4 :])
    return folder / "a.jpg"


def folder_with_a_large_image(folder: Path) -> Path:
    with_hole(folder / "train" / "cat" / "a.png", b"\x89PNG\r\n\x1a\n")
    return folder


def idx_that_inflates(folder: Path) -> Path:
    zeros = gzip.compress(bytes(32 << 20), 1)  # gzip members may follow each other
    head = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 10, 28, 28))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(head + 60 * zeros)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 10) + bytes(10)))
    return folder


def idx_that_claims(folder: Path) -> Path:
    for name, shape in (("images-idx3", (2**31, 28, 28)), ("labels-idx1", (10,))):
        head = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        (folder / f"train-{name}-ubyte").write_bytes(head + bytes(10))
    return folder


def tar_with(kind: bytes, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, 2 << 30
        with_hole(folder / "train-0.tar", member.tobuf(tarfile.USTAR_FORMAT))
        return folder

    return make


def table(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with_hole(folder / name, b"file,label\n")
        return folder

    return make


def parquet_that_inflates(folder: Path) -> Path:
    """One image of 2 GB of zeros in a file of a few kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    block = pa.array([bytes(64 << 20)] * 1, pa.binary())
    images = pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array([0] * 32, pa.int32()), block)])
    labels = pa.array([0] * 32)
    whole = pa.table({"image": images, "label": labels})
    pq.write_table(whole, folder / "train.parquet", compression="zstd")
    return folder


def npz_that_claims(folder: Path) -> Path:
    """An array of 2^40 numbers, of which the archive has none, and one of 256 MB that was compressed to nothing."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size, data in (("a", 2**40, b""), ("b", 2**26, bytes(2**28))):
            text = header % size + b"\n"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return folder / "a.npz"


def safetensors_that_claims(folder: Path) -> Path:
    """A header of 2 GB."""
    return with_hole(folder / "a.safetensors", struct.pack("<Q", 2 << 30) + b"{")


def safetensors_of_gigabytes(folder: Path) -> Path:
    """One tensor of 3 GB that no model has: it is named and not read."""
    head = json.dumps({"x": {"dtype": "F32", "shape": [GIGABYTES // 4], "data_offsets": [0, GIGABYTES]}}).encode()
    return with_hole(folder / "a.safetensors", struct.pack("<Q", len(head)) + head, GIGABYTES + 8 + len(head))


def config_beside_weights(folder: Path) -> Path:
    head = json.dumps({"head/bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    with_hole(folder / "config.json", b"{")
    return folder


def run_with(name: str) -> Callable[[Path], Path]:
    """A run one of whose files is replaced by gigabytes."""

    def make(folder: Path) -> Path:
        step = folder / "checkpoints" / "2"
        (step / "state").mkdir(parents=True)
        (step / "record").mkdir()
        (step / "commit_success.txt").touch()
        (folder / "config.json").write_text('{"config": {"model": {}, "data": {"transform": {"size": [28, 28]}}}}')
        with_hole(folder / name, b"{")
        return folder

    return make


FILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "PNG of many pixels": ("image", png_of_many_pixels),
    "PNG that inflates": ("image", png_that_inflates),
    "PNG that claims a chunk": ("image", claims("a.png", png(8, 8, b"")[:33] + b"\x7f\xff\xff\xf0IDAT")),
    "JPEG of many pixels": ("image", jpeg_of_many_pixels),
    "GIF of many pixels": ("image", claims("a.gif", b"GIF89a" + struct.pack("<HHBBB", 65_500, 65_500, 0, 0, 0))),
    "BMP of many pixels": (
        "image",
        claims("a.bmp", b"BM" + struct.pack("<IIIIiiHHIIIIII", 60, 0, 54, 40, 10**6, 10**6, 1, 24, 0, 0, 0, 0, 0, 0)),
    ),
    "PPM of many pixels": ("image", claims("a.ppm", b"P6 1000000 1000000 255\n")),
    "image file of gigabytes": ("set", folder_with_a_large_image),
    "gzip that inflates": ("set", idx_that_inflates),
    "IDX that claims": ("set", idx_that_claims),
    "tar with a long name": ("set", tar_with(tarfile.XHDTYPE, "x")),
    "tar with a large image": ("set", tar_with(tarfile.REGTYPE, "x.png")),
    "tar with a large label": ("set", tar_with(tarfile.REGTYPE, "x.cls")),
    "CSV of one line": ("set", table("train.csv")),
    "TSV of one line": ("set", table("train.tsv")),
    "parquet that inflates": ("set", parquet_that_inflates),
    "npz that claims": ("weights", npz_that_claims),
    "safetensors that claims": ("weights", safetensors_that_claims),
    "safetensors of gigabytes": ("weights", safetensors_of_gigabytes),
    "ONNX of gigabytes": ("weights", lambda folder: with_hole(folder / "a.onnx", b"\x08\x07\x3a\xff\xff\xff\xff\x07")),
    "pickle": ("weights", lambda folder: with_hole(folder / "a.pkl", b"\x80\x04")),
    "PyTorch file": ("weights", lambda folder: with_hole(folder / "a.pth", b"\x80\x04")),
    "config.json beside weights": ("weights", config_beside_weights),
    "config.json of a run": ("run", run_with("config.json")),
    "record of a checkpoint": ("run", run_with("checkpoints/2/record/metadata")),
    "metadata of a checkpoint": ("run", run_with("checkpoints/2/state/_METADATA")),
    "array metadata of a checkpoint": ("run", run_with("checkpoints/2/state/manifest.ocdbt")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_takes_at_most_a_gibibyte(lab: campaign.Lab, name: str, tmp_path: Path) -> None:
    reader, make = FILES[name]
    ended = lab.forks.start(hostile.read, reader, str(make(tmp_path))).wait(120)
    verdict = hostile.verdict_of(ended, name, "")
    assert verdict.answer == "refused" or (verdict.answer == "equal" and name in READ), verdict
    assert "MemoryError" not in ended.error


# Read and not refused: a PNG's pixels without the rest, a set without an image that is too large, a tensor's name.
READ = {"PNG that inflates", "image file of gigabytes", "parquet that inflates", "safetensors of gigabytes"}


def test_the_limit_is_one_gibibyte(lab: campaign.Lab) -> None:
    """Half a gibibyte can be had, and one cannot."""
    codes = [lab.forks.start(hostile.read, "bytes", str(size)).wait(120).code for size in (1 << 29, 5 << 28)]
    assert codes[0] == 0
    assert codes[1] not in (0, 2)
