"""What the doors share: from the command line to a config, and from an error to one sentence."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

PACKAGE = Path(__file__).parent


def define_config(required: bool = True) -> Any:
    """Defines --config=FILE.py[:ARGUMENT], with --config.field=value to override any field of it."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "A file in configs/, such as configs/vit_imagenet.py:S/16; --config.optim.lr=3e-4 overrides."
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[Sequence[str]], Any], doc: str | None) -> None:
    """Parses the command line, calls `main` with what is left of it, and exits.

    What a user can mend, a bad flag, field, file or number, ends in one sentence on stderr and exit code 2. Anything
    else is a bug and keeps its traceback.
    """
    if any(argument in ("--help", "-h", "-help") for argument in sys.argv[1:]):
        print(_help(doc))
        sys.exit(0)
    try:
        try:
            rest = flags.FLAGS(sys.argv)
        except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
            raise _Mistake(_flag_sentence(error)) from error
        except OSError as error:
            raise _Mistake(f"{error.filename}: {error.strerror}") from error
        if len(rest) > 1:
            raise _Mistake(f"{rest[1]!r} is no flag; flags look like --name=value")
        main(rest)
    except _Mistake as mistake:
        _leave(str(mistake))
    except FloatingPointError as error:
        _leave(str(error))
    except (ValueError, FileNotFoundError) as error:
        if not _raised_here(error):
            raise
        _leave(str(error))


class _Mistake(Exception):
    """A sentence for the user."""


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _raised_here(error: BaseException) -> bool:
    """Whether this project itself raised the error: then its text is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (PACKAGE in Path(frames[-1].filename).parents or "configs" in Path(frames[-1].filename).parts)


def _flag_sentence(error: BaseException) -> str:
    """Returns the last line of what the flags' parser said, without its wrapping."""
    text = str(error.args[0]) if error.args else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"\s+", " ", " ".join(lines)) if lines else type(error).__name__


def _help(doc: str | None) -> str:
    own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
    config = [flags.FLAGS["config"]] if "config" in flags.FLAGS else []
    lines = [(doc or "").strip(), "", "flags:"]
    for flag in [*config, *(flag for flag in own if flag.name != "config")]:
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)
