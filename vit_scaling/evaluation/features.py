"""Features of any number of images in one .npz file, which is written without holding them in memory."""

import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class FeatureWriter:
    """Writes an .npz with "files" [N] and "features" float32 [N, width]; the file is complete or absent.

    Until the end names and features lie in nameless files beside it, which take as much space as the result.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._names = tempfile.TemporaryFile("w+", dir=self._path.parent)  # noqa: SIM115
        self._features = tempfile.TemporaryFile("w+b", dir=self._path.parent)  # noqa: SIM115
        self._count = self._width = 0
        self._longest = 1  # NumPy has no strings of length 0

    def add(self, file: str, features: np.ndarray) -> None:
        """Adds one image: its name and its features [width]."""
        self._names.write(json.dumps(file) + "\n")
        self._features.write(np.asarray(features, "<f4").tobytes())
        self._count, self._width = self._count + 1, len(features)
        self._longest = max(self._longest, len(file))

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._names, self._features:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open("files.npy", "w", force_zip64=True) as member:
                _header(member, f"<U{self._longest}", (self._count,))
                self._names.seek(0)
                for line in self._names:
                    member.write(json.loads(line).encode("utf-32-le", "surrogatepass").ljust(4 * self._longest, b"\0"))
            with archive.open("features.npy", "w", force_zip64=True) as member:
                _header(member, "<f4", (self._count, self._width))
                self._features.seek(0)
                shutil.copyfileobj(self._features, member, 2**20)
        os.replace(partial, self._path)


def _header(stream: Any, kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_2_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
