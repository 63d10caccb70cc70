"""Paths that a user gives: local ones, in which `~` and $VARIABLES are expanded, and gs://BUCKET/... where one works.

`expand` is the one place that reads such a text. Nothing is ever written into a folder named `~`, `$HOME` or `gs:`.
"""

import atexit
import contextlib
import errno
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_scaling import UserError

BUCKET, HUB = "gs://", "hf://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand(text: str | os.PathLike[str], *, bucket: bool = False, hub: bool = False) -> str:
    """Returns a path with `~`, `~USER`, $NAME and ${NAME} replaced by what they stand for.

    Args:
        text: a local path or, where `bucket` and `hub` allow it, gs://BUCKET/PATH or hf://OWNER/NAME[@REVISION].

    Raises:
        UserError: the path is empty, its user or variable is not known, or it is of a kind that does not work here.
    """
    given = str(text)
    if not given:
        raise UserError("the path is empty; name a file or a folder")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UserError(f"the path {given!r} needs the environment variable {name!r}, which is not set")
        return os.environ[name]

    path = _VARIABLE.sub(value, given)
    if path.startswith("~") and (path := os.path.expanduser(path)).startswith("~"):
        raise UserError(f"the path {given!r} names the home of a user who is not known on this machine")
    if (found := _SCHEME.match(path)) is None:
        return path
    if path.startswith(HUB) and hub:
        if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?", path):
            raise UserError(
                f"the path {given!r} names no repository; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
            )
        return path
    if not path.startswith(BUCKET):
        near = "write gs://BUCKET/PATH, with two slashes" if found[1] == "gs" else _WHERE
        raise UserError(f"the path {given!r} is of a kind ({found[1]}:) that is not supported; {near}")
    if not bucket:
        raise UserError(
            f"the path {given!r} is in a bucket, which does not work here; use a local path and copy it with "
            f"`gcloud storage cp -r`, or mount the bucket with gcsfuse"
        )
    if not re.match(r"gs://[^/]+(/|$)", path):
        raise UserError(f"the path {given!r} names no bucket; write gs://BUCKET/PATH")
    return path


_WHERE = (
    "give a local path or, for runs and their checkpoints, gs://BUCKET/PATH or, for weights to read, hf://OWNER/NAME"
)


def local(text: str | os.PathLike[str]) -> Path:
    """Returns a local path.

    Raises:
        UserError: as `expand`; a bucket is refused.
    """
    return Path(expand(text))


def place(text: str | os.PathLike[str]) -> Path:
    """Returns a path that may lie in a bucket: a pathlib.Path, or an epath.Path, which has the same methods.

    Raises:
        UserError: as `expand`; or it is in a bucket and the extra that reads buckets is not installed.
    """
    path = expand(text, bucket=True)
    if not path.startswith(BUCKET):
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} is in a bucket, which needs the extra gcs: pip install 'vit_scaling[gcs]'")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks for permissions that few have
    import fsspec
    from etils import epath

    # Another process may have written since this one last looked.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    found: Any = epath.Path(path)
    return found


def fetched(text: str | os.PathLike[str]) -> Path:
    """Returns a local path of weights: the path itself or, of a bucket, a copy for as long as this process lives.

    A folder is copied with its files; a file with the .json files beside it and those whose names begin with its own.

    Raises:
        UserError: as `place`; or there is nothing of that name.
    """
    path = place(text)
    return _copied(str(path)) if in_bucket(path) else path


@functools.cache
def _copied(text: str) -> Path:
    path = place(text)
    if not path.exists():
        raise UserError(f"there is no weight file or folder {str(path)!r}")
    is_folder = path.is_dir()
    folder = temporary_folder()
    for file in (path if is_folder else path.parent).iterdir():
        if file.is_file() and (is_folder or file.suffix == ".json" or file.name.startswith(path.name)):
            file.copy(folder / file.name)  # type: ignore[attr-defined]
    return folder if is_folder else folder / path.name


def temporary_folder() -> Path:
    """Returns a new local folder, which is deleted when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vit_scaling-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_bucket(path: os.PathLike[str] | str) -> bool:
    """Returns whether a path that `place` returned lies in a bucket."""
    return str(path).startswith(BUCKET)


def write(path: Path, data: str | bytes) -> None:
    """Writes a file whole or not at all. An object in a bucket always is; a local file is renamed into its place."""
    data = data.encode() if isinstance(data, str) else data
    if in_bucket(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a local file for a library to write; it becomes `path` if nothing fails, and is gone otherwise."""
    if in_bucket(path):
        import fsspec

        with tempfile.TemporaryDirectory(prefix="vit_scaling-") as folder:
            yield Path(folder) / path.name
            fsspec.filesystem("gs").put_file(str(Path(folder) / path.name), str(path))
        return
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def size(path: Path) -> int:
    """Returns the bytes of a file."""
    status = path.stat()
    return status.length if in_bucket(path) else status.st_size  # type: ignore[attr-defined]


def append(path: Path, text: str) -> None:
    """Appends to a file, which in a bucket is written again."""
    if in_bucket(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def absolute(path: Path) -> Path:
    """Returns the same path from the root of its file system. (An epath.Path would take itself for a local one.)"""
    return path if in_bucket(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Makes a folder; a bucket needs none, but it has to exist.

    Raises:
        UserError: there is no such bucket.
    """
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    bucket = place(BUCKET + str(path).removeprefix(BUCKET).split("/")[0])
    if not bucket.exists():
        raise UserError(f"there is no bucket {bucket}, or these credentials do not show it; create it first")


def move_folder(path: Path, target: Path) -> None:
    """Renames a folder in place of what the target was. In a bucket, object by object."""
    remove_folder(target)
    path.replace(target)


def upload(folder: Path, target: Path) -> None:
    """Writes the files of a local folder, as they are now, below a target in a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (target / str(file.relative_to(folder))).write_bytes(file.read_bytes())


def remove_folder(path: Path) -> None:
    """Deletes a folder with all that is in it; none is fine."""
    if in_bucket(path):
        if path.exists():
            path.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path, ignore_errors=True)


_DISK = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ESTALE", "ENODEV", "ETIMEDOUT")
}


def fault_of_disk(error: BaseException) -> str | None:
    """Returns what a disk or file system that failed says, such as "No space left on device"; None for other errors."""
    for each in _causes(error):
        for number in _DISK & _numbers(each):
            name = getattr(each, "filename", None)
            return os.strerror(number) + (f": {name}" if name else "")
    return None


def is_missing_file(error: BaseException) -> bool:
    """Whether an error comes from a file or folder that is not there."""
    return any(errno.ENOENT in _numbers(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _numbers(error: BaseException) -> set[int]:
    """Returns the operating system's numbers of an error; libraries tell them as text."""
    own = {error.errno} if isinstance(error, OSError) and error.errno is not None else set()
    return own | {int(number) for number in re.findall(r"(?:os_error_code='|\[Errno )(\d+)", str(error))}
