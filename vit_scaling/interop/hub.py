"""Weights on the Hugging Face Hub: hf://OWNER/NAME[@REVISION] as input, and exported folders as repositories.

The package huggingface_hub (the extra `hub`) is imported only where such a path is used. It reads HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE, and keeps what it has downloaded.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vit_scaling
from vit_scaling import TransientError, UserError, paths

# What a repository is searched for, the first that is there; no code, and nothing of subfolders.
_WANTED = (("*.safetensors",), ("*.npz",), ("*.onnx",), ("*.bin", "*.pth", "*.pt"))


def place(text: str | os.PathLike[str]) -> Path:
    """Returns where weights lie: as `paths.place` or, of hf://OWNER/NAME[@REVISION], the folder of a download.

    Raises:
        UserError: as `paths.place`; the extra is not installed, or there is no such repository, revision or weight file
            that these credentials show.
        TransientError: the Hub cannot be reached.
    """
    path = paths.expand(text, bucket=True, hub=True)
    return _download(path) if path.startswith(paths.HUB) else paths.place(path)


def fetched(text: str | os.PathLike[str]) -> Path:
    """Returns a local path of weights: as `place` or, of a bucket, of a copy."""
    path = place(text)
    return paths.fetched(path) if paths.in_bucket(path) else path


@functools.cache
def _download(path: str) -> Path:
    repository, _, revision = path.removeprefix(paths.HUB).partition("@")
    library = _library(path)
    with _said(path):
        for patterns in _WANTED:
            folder = Path(
                library.snapshot_download(
                    repository,
                    revision=revision or None,
                    allow_patterns=["*.json", *patterns],
                    ignore_patterns=["*/*"],
                    library_name="vit_scaling",
                    library_version=vit_scaling.__version__,
                )
            )
            if folder.is_dir() and any(file.match(pattern) for file in folder.iterdir() for pattern in patterns):
                return folder
    raise UserError(f"{path} holds no weight file that is read here ({', '.join(sum(_WANTED, ()))})")


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads a folder to a repository OWNER/NAME[@BRANCH], which is made if there is none; returns its address.

    Raises:
        UserError: the extra is not installed, or these credentials may not write there.
        TransientError: the Hub cannot be reached.
    """
    name, _, branch = check(repository).partition("@")
    library = _library(repository)
    with _said(repository):
        api = library.HfApi(library_name="vit_scaling", library_version=vit_scaling.__version__)
        address = api.create_repo(name, private=not public, exist_ok=True)
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        message = f"Written by vit_scaling {vit_scaling.__version__}"
        api.upload_folder(repo_id=name, folder_path=folder, revision=branch or None, commit_message=message)
    return str(address)


def check(repository: str) -> str:
    """Returns the name of a repository.

    Raises:
        UserError: it is not OWNER/NAME or OWNER/NAME@BRANCH.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", repository):
        raise UserError(f"--repo is {repository!r}; it must be OWNER/NAME or OWNER/NAME@BRANCH")
    return repository


def _library(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{what} needs the package huggingface_hub, which is not installed: pip install 'vit_scaling[hub]'"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Turns the library's errors into one sentence: of the user where another name or token helps."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{what}: its owner lets only those read it who have accepted its terms on the Hub") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: the repository has no such revision") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise UserError(
            f"{what}: the Hub shows no such repository to these credentials ({type(error).__name__}); check the name, "
            f"or log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        text = " ".join(str(error).split())[:200]
        kind = UserError if status in (400, 401, 403, 404, 409, 422) else TransientError
        raise kind(f"{what}: the Hub answers {status} ({text})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise TransientError(f"{what}: the Hub cannot be reached, and no download is kept ({error})") from None
    except Exception as error:  # of the library that carries the requests, whichever it is
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise TransientError(f"{what}: the connection to the Hub failed ({type(error).__name__}: {error})") from None
