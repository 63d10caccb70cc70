"""Small images and sets of them, for the tests of sources and of prepare."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np


def encoded(number: int, extension: str = ".png") -> bytes:
    """Returns a small image file that differs from those of other numbers."""
    image = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.imencode(extension, image)[1].tobytes()


PNG = encoded(0)
JPEG = encoded(0, ".jpg")


def make(root: Path, *names: str, content: bytes = PNG) -> Path:
    """Writes one image to each of the names below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, members: Iterable[tuple], mode: str = "w") -> Path:
    """Writes (name or TarInfo, content) to a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
