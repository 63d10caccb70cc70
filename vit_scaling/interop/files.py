"""Untrusted weight files: safetensors, NumPy's .npz, PyTorch's .pth, ONNX.

Nothing of a file is executed, and a tensor is read only when its name and shape have been checked against a model: an
open file is a table of names, shapes and types, whose sizes must add up to no more than the file can hold.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from vit_scaling import UserError, paths
from vit_scaling.interop import hub, onnx
from vit_scaling.interop.stored import Stored

FLOATS = ("float32", "float16", "bfloat16", "float64")
PROCESSOR = "preprocessor_config.json"
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", ".onnx", *TORCH)
CONTAINERS, AVERAGES = ("model", "state_dict", "model_state_dict"), ("model_ema", "state_dict_ema")
CONVERSION = (
    'python -c "import sys, torch; from safetensors.torch import save_file; f = torch.load(sys.argv[1], '
    "map_location='cpu', weights_only=True); f = f.get('model', f.get('state_dict', f)); "
    "save_file({k: v.contiguous().clone() for k, v in f.items()}, 'model.safetensors')\""
)
MAX_INFLATION = 16  # weights hardly compress; an archive that claims to hold so many times its size is a bomb
MAX_TABLE = 1 << 27  # bytes; the names and shapes of a .pth file
_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Formats that run code when they are read.
_PICKLES = (".pkl", ".pickle", ".npy", ".msgpack", ".ckpt", ".h5", ".joblib")


def open_weights(path: str | Path, ema: bool = False) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """Opens a weight file, or a folder of one model.

    Args:
        path: a .safetensors, .npz, .onnx, .pth, .pt or .bin file, or a folder that holds one (or shards with an index).
        ema: whether to take the average of the parameters that a .pth file holds beside them.

    Returns:
        (tensors by name, what config.json beside them says or None).

    Raises:
        UserError: there is no such file, it is damaged, or it is of a kind that is not read; one sentence says which.
    """
    path = hub.fetched(path)
    if not path.exists():
        raise UserError(f"there is no weight file or folder {str(path)!r}")
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        return _with_neighbour(*_open_file(path, ema), folder)
    if (folder / INDEX).exists():
        return _open_shards(folder), _neighbour(folder)
    found = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    found = found or sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{folder} must hold one weight file ({', '.join(SUFFIXES)}); it holds {names}")
    return _with_neighbour(*_open_file(found[0], ema), folder)


def _open_file(path: Path, ema: bool) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """Returns (tensors, what an ONNX file's graph tells)."""
    if ema and path.suffix not in TORCH:
        raise UserError(f"{path} holds no average of parameters; of weight files only {', '.join(TORCH)} may have one")
    if path.suffix == ".safetensors":
        return _open_safetensors(path), None
    if path.suffix == ".npz":
        return _open_npz(path), None
    if path.suffix == ".onnx":
        return onnx.open_onnx(path)
    if path.suffix in TORCH:
        return _open_torch(path, ema), None
    if path.suffix in _PICKLES:
        raise UserError(
            f"{path} is of a kind that can run code when it is read or that is not known here; convert it to "
            f".safetensors where you trust it"
        )
    raise UserError(f"{path} is no weight file; its name must end in {', '.join(SUFFIXES)}")


def _with_neighbour(
    tensors: dict[str, Stored], graph: dict[str, Any] | None, folder: Path
) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    found = _neighbour(folder)
    return tensors, found if graph is None else {**(found or {}), onnx.KEY: graph}


def _neighbour(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    if not path.exists():
        return None
    return read_json(path)


def processor(path: str | Path) -> dict[str, Any] | None:
    """Returns what preprocessor_config.json beside a weight file, or in its folder, says; None if there is none."""
    path = hub.fetched(path)
    beside = (path if path.is_dir() else path.parent) / PROCESSOR
    return read_json(beside) if beside.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        UserError: it cannot be read as one.
    """
    if path.stat().st_size > 16 * 2**20:
        raise UserError(f"{path} is larger than 16 MB; that is no config")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object")
    return value


# ---- safetensors


def _open_safetensors(path: Path) -> dict[str, Stored]:
    """The library checks that the header's offsets cover the file exactly; nothing else is read here."""

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safetensors.safe_open(path, framework="np") as file:
                return file.get_tensor(name)

        return read

    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(
                    tuple(part.get_shape()),
                    _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype().lower()),
                    reader(name),
                )
                for name, part in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from None


def _open_shards(folder: Path) -> dict[str, Stored]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / INDEX} must say in weight_map which file each tensor is in")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names the file {name!r}, which is not in {folder}")
        tensors |= _open_safetensors(folder / name)
    if missing := sorted(index.keys() - tensors.keys()):
        raise UserError(f"{folder / INDEX} names the tensor {missing[0]!r}, which no file holds")
    return tensors


# ---- .npz


def _open_npz(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    tensors: dict[str, Stored] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    raise UserError(f"{path} holds {info.filename!r}, which is no array")
                with archive.open(info) as member:
                    shape, dtype, header = _npy_header(member, path, info.filename)
                if header + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise UserError(f"{path}: the size of {info.filename!r} is not that of an array of {shape}")
                name = info.filename.removesuffix(".npy")
                # NumPy has no bfloat16: it is stored as two bytes of no type.
                kind = "bfloat16" if dtype == np.dtype("V2") else dtype.name
                tensors[name] = Stored(shape, kind, _npz_reader(path, info.filename))
            total = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is no whole .npz file: {error}") from None
    if total > MAX_INFLATION * size + 2**20:
        raise UserError(f"{path} has {size} bytes and claims to hold {total}; weights do not compress like that")
    return tensors


def _npy_header(member: Any, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Returns (shape, type, bytes of the header) of an array; no object may be inside."""
    try:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = readers[version](member)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"{path}: {name!r} is no array that can be read") from None
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects, which are refused: reading them can run code")
    return shape, dtype, member.tell()


def _npz_reader(path: Path, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(name) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: {name!r} is damaged: {error}") from None
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

    return read


# ---- PyTorch


def _open_torch(path: Path, ema: bool) -> dict[str, Stored]:
    """Through torch's loader of weights alone, which unpickles tensors and plain containers and nothing else."""
    is_archive = _check_torch_archive(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read safely; install torch, or convert the file where it is installed: "
            f"{CONVERSION} {shlex.quote(str(path))}"
        ) from None
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # torch raises whatever it meets
        reason = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split())) or type(error).__name__
        advice = ""
        if "argparse.Namespace" in reason:
            advice = (
                "; it holds an argparse.Namespace beside its tensors: where you trust the file, call "
                "torch.serialization.add_safe_globals([argparse.Namespace]), load it, and save the tensors alone"
            )
        raise UserError(f"{path} is refused: torch.load(weights_only=True) says {reason!r}{advice}") from None
    averages = [key for key in AVERAGES if isinstance(value, Mapping) and isinstance(value.get(key), Mapping)]
    if ema and not averages:
        raise UserError(f"{path} holds no average of its parameters ({' or '.join(AVERAGES)}); leave ema out")
    if averages and not ema:
        logging.warning("%s also holds an average of its parameters (%s); --ema takes it", path, averages[0])
    for key in averages if ema else CONTAINERS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if isinstance(value, Mapping) and isinstance(value.get("teacher"), Mapping):  # DINO, iBOT and DINOv2 in training
        halves = {half: value[half] for half in ("teacher", "student") if isinstance(value.get(half), Mapping)}
        value = {f"{half}.{name}": tensor for half, part in halves.items() for name, tensor in part.items()}
    if not isinstance(value, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise UserError(f"{path} holds no table of tensors by name")

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        return lambda: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {
        name: Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), reader(tensor))
        for name, tensor in value.items()
    }


def _check_torch_archive(path: Path) -> bool:
    """Returns whether the file is an archive, as torch.save writes since version 1.6.

    Raises:
        UserError: a record is compressed, which torch.save never does: torch maps records into memory as they lie, so
            it would take the compressed bytes for numbers. Or the table of names would take gigabytes.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: {error}") from None
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path} holds {record.filename!r} compressed, so its tensors cannot be read; unpack the archive and "
                "pack it again without compression (zip -0)"
            )
        if record.filename.endswith("data.pkl") and record.file_size > MAX_TABLE:
            raise UserError(f"{path} is refused: its table of names takes {record.file_size} bytes")
    return True


# ---- writing


def write_folder(
    path: str | Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Writes a folder with model.safetensors, config.json and text files, as `new_folder` does."""
    with new_folder(path) as folder:
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
        for name, text in {CONFIG: json.dumps(config, indent=2) + "\n", **texts}.items():
            (folder / name).write_text(text)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `path` at the end, whole or not at all, or is uploaded to a bucket.

    Raises:
        UserError: something is there already.
    """
    path = paths.place(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; name a new folder for the weights")
    if paths.in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="vit_scaling-") as folder:
            yield Path(folder)
            paths.upload(Path(folder), path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
