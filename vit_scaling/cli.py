"""What the commands share: flags, configs by path or name, `--help`, and how errors become exit codes.

Exit codes: 0 done; 1 a fault of the program (with its traceback) or of the machine, so that starting again may help;
2 a mistake of the user, told in one sentence, so that starting again would not; 130 stopped by Ctrl-C.
"""
# ruff: noqa: E402

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType

PROGRAM = "vit-scaling"


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT: KeyboardInterrupt, except while modules are imported, where libraries can swallow it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_program() -> bool:
    """Returns whether this process is one of the commands, and not a program that imports them."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec is not None and spec.name.startswith("vit_scaling.")) or Path(sys.argv[0]).name == PROGRAM


if _is_program():  # before the slow imports below and in the commands
    signal.signal(signal.SIGINT, _interrupted)
    # By default Python looks for cycles after 700 new objects. A start makes a million, and took a fifth longer.
    gc.set_threshold(50_000)

import dataclasses
import re
import runpy
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from vit_scaling import TransientError, UserError, paths

PACKAGE = Path(__file__).parent
COMMANDS = ("train", "evaluate", "predict", "plan", "study", "costs", "prepare", "weights", "explore")
PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")


# ---- flags -----------------------------------------------------------------------------------------------------------


class PathParser(flags.ArgumentParser[str]):
    """Reads a path: `flags.DEFINE(cli.PathParser(), NAME, None, HELP)`.

    Only with `bucket` may it be in a bucket, only with `hub` on the Hugging Face Hub.
    """

    def __init__(self, bucket: bool = False, hub: bool = False):
        super().__init__()
        self._bucket, self._hub = bucket, hub

    def parse(self, argument: str) -> str:
        return paths.expand(argument, bucket=self._bucket, hub=self._hub)


def define_config(required: bool = True) -> Any:
    """Defines --config=FILE.py[:ARGUMENT], with --config.field=value to override any field of it."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "A config: a file, or a name in configs/ such as vit_imagenet:S/16; --config.optim.lr=3e-4 overrides a field.",
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_processes() -> Callable[[], None]:
    """Defines --coordinator, --num_processes and --process_id; returns what starts the processes accordingly."""
    known = "Known on Cloud TPU, Slurm and Open MPI."
    coordinator = flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0. {known}")
    count = flags.DEFINE_integer("num_processes", None, f"Number of processes of this run. {known}")
    number = flags.DEFINE_integer("process_id", None, f"Number of this process, from 0. {known}")

    def start() -> None:
        from vit_scaling.parallel import processes

        processes.start(coordinator.value, count.value, number.value)

    return start


def parse(argv: Sequence[str], commands: Sequence[str] = (), words: bool = False) -> list[str]:
    """Parses a command line, config and overrides included, and returns the words that are not flags.

    Args:
        argv: the program's name and its arguments.
        commands: the first word must be one of these, where there are any.
        words: allow other words that are not flags.

    Raises:
        UserError: a flag, the config or an override cannot be understood.
    """
    if commands and len(argv) > 1 and not argv[1].startswith("-") and argv[1] not in commands:
        raise UserError(f"{argv[1]!r} is not a command; choose one of {', '.join(commands)}")
    given = _given_config(argv[1:])
    if given is not None and _takes_config():
        flags.FLAGS["config"].parser = _Loaded(given, load_config(given))
    try:
        rest = flags.FLAGS(list(argv))
    except Exception as error:  # of the parsers of absl and ml_collections: nothing of ours runs in them
        raise UserError(_flag_sentence(error)) from error
    if given is not None and _takes_config():
        from vit_scaling.training import fields

        fields.check_types(flags.FLAGS["config"].value, "config")
    if commands and (len(rest) < 2 or rest[1] not in commands):
        raise UserError(f"name a command, one of {', '.join(commands)}")
    extra = rest[2 if commands else 1 :]
    if extra and not words:
        raise UserError(f"{extra[0]!r} is not a flag; flags look like --name=value")
    return rest


def _takes_config() -> bool:
    return "config" in flags.FLAGS and not isinstance(flags.FLAGS["config"], flags.MultiFlag)


class _Loaded(flags.ArgumentParser):
    """Gives --config the config that was loaded already."""

    def __init__(self, text: str, config: Any):
        self._text, self._config = text, config

    def parse(self, path: str) -> Any:
        if path != self._text:
            raise UserError("--config is given twice")
        return self._config


def _given_config(arguments: Sequence[str]) -> str | None:
    """Returns the value of --config, or None if it is not given."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else next(iter(arguments[index + 1 :]), "")
    return None


def _flag_sentence(error: BaseException) -> str:
    """Returns what is wrong with the command line, rewritten where the parser's own text is not clear."""
    text = str(error.args[0]) if error.args else str(error)
    if unknown := re.search(r"Field (\w+) not found on dataclass <class '([\w.]+)\.(\w+)'>", text):
        name, module, owner = unknown.groups()
        names = [field.name for field in dataclasses.fields(getattr(sys.modules[module], owner))]
        return f"the config has no field {name!r} there; the fields of {owner} are {', '.join(names)}"
    if whole := re.search(r"flag --([\w.]+)=.*as instance of <class '([\w.]+)\.(\w+)'>", text):
        name, module, owner = whole.groups()
        if dataclasses.is_dataclass(kind := getattr(sys.modules.get(module), owner, None)):
            names = [field.name for field in dataclasses.fields(kind)]
            return (
                f"--{name} cannot be set as a whole: its fields are {', '.join(names)}, as in --{name}.{names[0]}=..."
            )
    if re.search(r"Unable to normalize ambiguous type|Could not parse '|does not exist and the type", text):
        return "an override names no field that can be set: write --config.NAME=VALUE with a NAME of train --help"
    if boolean := re.search(r"flag --([\w.]+)=(.*): \('Non-boolean argument", text):
        return f"--{boolean[1]} is {boolean[2]!r}; it must be true or false"
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing[1]} must be given; --help says what it is"
    return " ".join(text.split()) or f"the flags cannot be read: {type(error).__name__}"


# ---- configs ---------------------------------------------------------------------------------------------------------


def load_config(text: str) -> Any:
    """Returns what `get_config` of a config gives.

    Args:
        text: FILE.py[:ARGUMENT], or NAME[:ARGUMENT] for the file of that name in configs/.

    Raises:
        UserError: there is no such config, or the file itself is wrong; the sentence names file and line.
    """
    name, colon, argument = text.partition(":")
    if argument.startswith("//"):
        paths.expand(text)  # refuses it: a scheme, not a config and its argument
    path = _config_path(paths.expand(name) if name else name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"the config file {str(path)!r} has no function get_config(arg)")
        config = get_config(argument) if colon else get_config()
    except UserError:
        raise
    except Exception as error:
        if (line := _line_in(path, error)) is None:
            raise  # raised inside the package: a bug, which keeps its traceback
        raise UserError(f"the config file {path}:{line} failed: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(config):
        raise UserError(f"get_config of {str(path)!r} returned {type(config).__name__} and not a config")
    return config


def _config_path(name: str) -> Path:
    """Returns the file of a config that is given by its path, or by its name in the project's own configs/."""
    folder = next((folder for folder in (PACKAGE.parent / "configs", PACKAGE / "configs") if folder.is_dir()), None)
    if (path := Path(name)).is_file():
        return path
    if folder is not None and re.fullmatch(r"\w+", name) and (folder / f"{name}.py").is_file():
        return folder / f"{name}.py"
    if folder is not None and re.fullmatch(r"configs/\w+\.py", name) and (folder / path.name).is_file():
        return folder / path.name  # as the documents write it, from another folder
    if path.parent != Path() and path.parent.is_dir():
        found = [str(other) for other in path.parent.glob("[!_]*.py")]
    else:
        found = [other.stem for other in folder.glob("[!_]*.py")] if folder is not None else []
    choices = f"; there are {', '.join(sorted(found))}" if found else ""
    raise UserError(f"there is no config {name!r}{choices}")


def _line_in(path: Path, error: BaseException) -> int | None:
    """Returns the line of a config file that is at fault; None if the error was raised by what it called."""
    if isinstance(error, SyntaxError):
        return error.lineno or 1
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.lineno if last.filename == str(path) else 1 if last.filename == "<frozen runpy>" else None


def need_config(config: Any) -> None:
    """Raises UserError unless this is the config of a single run."""
    from vit_scaling import config as config_lib

    if not isinstance(config, config_lib.Config):
        raise UserError("--config is a study of many runs; run it with the command study")


def in_epochs(config: Any) -> bool:
    """Returns whether any duration of a config is in epochs, which need the size of the training set."""
    if dataclasses.is_dataclass(config):
        return any(in_epochs(getattr(config, field.name)) for field in dataclasses.fields(config))
    return config == "epochs"


# ---- help ------------------------------------------------------------------------------------------------------------


def _help(doc: str | None) -> str:
    """Returns a command's docstring, its flags and, where it takes a config, every field that can be overridden."""
    from vit_scaling.training import fields

    shared = [flags.FLAGS[name] for name in ("config", *PROCESS_FLAGS) if name in flags.FLAGS]
    own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
    lines = []
    if Path(sys.argv[0]).name == PROGRAM:
        doc = (doc or "").replace("./run.sh", PROGRAM)
    for block in (doc or "").strip().split("\n\n"):
        lines += [*(block.splitlines() if block.startswith(" ") else textwrap.wrap(block, 80)), ""]
    lines.append("flags:")
    for flag in [*own, *(flag for flag in shared if flag not in own)]:
        default = "" if flag.default in (None, [], "") or flag.name == "config" else f" (default: {flag.default})"
        lines += fields.wrapped(f"--{flag.name}", f"{flag.help}{default}")
    if _takes_config():
        lines += ["", *fields.describe()]
    return "\n".join(lines)


# ---- errors and exit codes -------------------------------------------------------------------------------------------


def main() -> None:
    """Runs `vit-scaling COMMAND ...`, the same as `python -m vit_scaling.COMMAND ...`."""
    here = [name for name in COMMANDS if (PACKAGE / f"{name}.py").is_file()]
    if len(sys.argv) < 2 or sys.argv[1] not in here:
        helped = sys.argv[1:2] and sys.argv[1] in ("--help", "-h", "help")
        text = f"usage: {PROGRAM} COMMAND [--help] [flags]\ncommands: {', '.join(here)}"
        print(text, file=sys.stdout if helped else sys.stderr)
        sys.exit(0 if helped else 2)
    command = sys.argv.pop(1)
    runpy.run_module(f"vit_scaling.{command}", run_name="__main__", alter_sys=True)


def run(
    main: Callable[[Sequence[str]], Any], doc: str | None, commands: Sequence[str] = (), words: bool = False
) -> None:
    """Parses the command line, calls `main` with the words that are not flags, and exits as the module says.

    Args:
        main: the command.
        doc: the command's docstring, which --help prints.
        commands: the words of which the first argument must be one.
        words: the command takes other words, such as files.
    """
    try:
        if any(argument in ("--help", "-h", "-help") for argument in sys.argv[1:]):
            print(_help(doc), flush=True)
        else:
            main(parse(sys.argv, commands, words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        _exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1)
    except Exception as error:
        if (sentence := _fault_of_the_machine(error)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
        _exit(1)


def _fault_of_the_machine(error: BaseException) -> str | None:
    """Returns the sentence for a fault that a restart may cure; None for a bug, which keeps its traceback."""
    if isinstance(error, TransientError):
        return str(error)
    fault = paths.fault_of_disk(error)
    return (
        f"a file cannot be read or written ({fault}); free space or repair the disk, and start again" if fault else None
    )


def _exit(code: int) -> NoReturn:
    """Exits, in a run of several processes without waiting for them."""
    sys.stdout.flush()
    if "jax" not in sys.modules:
        sys.exit(code)
    from vit_scaling.parallel import processes

    processes.leave(code)
