"""What the doors share: from the command line to a config, and from an error to one sentence."""

import dataclasses
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

PACKAGE = Path(__file__).parent
PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")


def define_config(required: bool = True) -> Any:
    """Defines --config=FILE.py[:ARGUMENT], with --config.field=value to override any field of it."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "A file in configs/, such as configs/vit_imagenet.py:S/16; --config.optim.lr=3e-4 overrides."
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_processes() -> Callable[[], None]:
    """Defines --coordinator, --num_processes and --process_id; returns what starts the processes as they say."""
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0. Cloud TPU and Slurm tell it.")
    count = flags.DEFINE_integer("num_processes", None, "How many processes run this. Cloud TPU and Slurm tell it.")
    number = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0. Cloud TPU and Slurm tell it.")

    def start() -> None:
        from vit_scaling.parallel import processes

        processes.start(coordinator.value, count.value, number.value)

    return start


def run(main: Callable[[Sequence[str]], Any], doc: str | None, commands: Sequence[str] = ()) -> None:
    """Parses the command line, calls `main` with what is left of it, and exits.

    A door that has `commands` takes one of them as its first word.

    What a user can mend, a bad flag, field, file or number, ends in one sentence on stderr and exit code 2. Anything
    else is a bug and keeps its traceback.
    """
    if any(argument in ("--help", "-h", "-help") for argument in sys.argv[1:]):
        print(_help(doc))
        sys.exit(0)
    try:
        _check_config_file(sys.argv[1:])
        try:
            rest = flags.FLAGS(sys.argv)
        except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
            raise _MistakeError(_flag_sentence(error)) from error
        if commands and (len(rest) < 2 or rest[1] not in commands):
            given = f"{rest[1]!r} is no command" if len(rest) > 1 else "a command is missing"
            raise _MistakeError(f"{given}; choose one of {', '.join(commands)}")
        extra = rest[2 if commands else 1 :]
        if extra:
            raise _MistakeError(f"{extra[0]!r} is no flag; flags look like --name=value")
        main(rest)
    except _MistakeError as mistake:
        _leave(str(mistake))
    except FloatingPointError as error:
        _leave(str(error))
    except Exception as error:
        if not isinstance(error, (ValueError, FileNotFoundError, RuntimeError)) or not _raised_here(error):
            traceback.print_exc()
            _exit(1)
        _leave(str(error))


class _MistakeError(Exception):
    """A sentence for the user."""


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    _exit(2)


def _exit(code: int) -> NoReturn:
    """Exits, in a run of several processes without waiting for them."""
    if "jax" not in sys.modules:
        sys.exit(code)
    from vit_scaling.parallel import processes

    processes.leave(code)


def _raised_here(error: BaseException) -> bool:
    """Whether this project itself raised the error: then its text is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (
        PACKAGE in Path(frames[-1].filename).parents or "configs" in Path(frames[-1].filename).parts
    )


def _flag_sentence(error: BaseException) -> str:
    """Returns what is wrong with the command line, in the words of this project where the parser's are not clear."""
    text = str(error.args[0]) if error.args else str(error)
    if unknown := re.search(r"Field (\w+) not found on dataclass <class '([\w.]+)\.(\w+)'>", text):
        name, module, owner = unknown.groups()
        fields = ", ".join(field.name for field in dataclasses.fields(getattr(sys.modules[module], owner)))
        return f"the config has no field {name!r} there; the fields of {owner} are {fields}"
    if whole := re.search(r"flag --([\w.]+)=.*as instance of <class '([\w.]+)\.(\w+)'>", text):
        name, module, owner = whole.groups()
        if dataclasses.is_dataclass(kind := getattr(sys.modules.get(module), owner, None)):
            names = [field.name for field in dataclasses.fields(kind)]
            return (
                f"--{name} cannot be set as a whole: its fields are {', '.join(names)}, as in --{name}.{names[0]}=..."
            )
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing[1]} must be given; --help tells what it is"
    if "Traceback" in text:  # a config file that raised: its last line is the sentence
        return re.sub(r"^\w+(Error|Exception): ", "", text.strip().splitlines()[-1].strip())
    return " ".join(text.split()) or type(error).__name__


def _check_config_file(arguments: Sequence[str]) -> None:
    """Raises _MistakeError if --config names no file; the parser would say so in twenty lines."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if name != "config" or not argument.startswith("-"):
            continue
        value = value if equals else next(iter(arguments[index + 1 :]), "")
        path = Path(value.partition(":")[0])
        if not path.is_file():
            beside = sorted(str(other) for other in (path.parent if path.parent.is_dir() else Path()).glob("*.py"))
            choices = f"; beside it are {', '.join(beside)}" if beside else ""
            raise _MistakeError(f"there is no config file {str(path)!r}{choices}")


def _help(doc: str | None) -> str:
    shared = [flags.FLAGS[name] for name in ("config", *PROCESS_FLAGS) if name in flags.FLAGS]
    own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
    lines = [(doc or "").strip(), "", "flags:"]
    for flag in [*own, *(flag for flag in shared if flag not in own)]:
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)
