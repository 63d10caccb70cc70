"""The processes of a run: how they find each other, and how they tell each other small things.

One process needs nothing. Several find each other by what Cloud TPU, Slurm or Open MPI put into their surroundings, or
by explicit flags. What they say here are small JSON values, through the coordinator that jax.distributed runs beside
process 0; arrays go over the devices. Each function that speaks must be called by all processes, in the same order.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from vit_scaling import TransientError, UserError

WAIT_SECONDS = 600.0  # so far may the processes be apart before a step: they open the same data

_conversation = itertools.count()  # every exchange needs names of its own


# ---- start -----------------------------------------------------------------------------------------------------------


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its run; call it before anything touches a device.

    Args:
        coordinator: host:port of process 0, reachable from all others.
        num_processes: how many processes there are, this one included.
        process_id: which of them this is, from 0 on.

    Where all are None, Slurm, Open MPI and Cloud TPU are asked; where none of them has started this process, it is
    alone. Under Slurm and Open MPI what is given comes before what they say.

    Raises:
        UserError: the arguments do not fit each other, or some are missing.
    """
    found = arguments(coordinator, num_processes, process_id, os.environ)
    if found is not None:
        # JAX's preemption service takes SIGTERM for itself; interrupts.py has its own agreement.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(**found)
        except ValueError as error:
            raise UserError(
                f"JAX does not find the other processes ({str(error).rstrip('.')}): give --coordinator=HOST:PORT, "
                f"--num_processes and --process_id, or --num_processes=1 for this process alone"
            ) from error


def arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns the arguments of jax.distributed.initialize, which finds what is not among them; None for one process.

    Raises:
        UserError: see `start`.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, as 10.0.0.1:8476")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes is {num_processes}; it must be at least 1")

    open_mpi = _open_mpi(environment)  # first: mpirun starts its processes inside steps of Slurm
    cluster = open_mpi or _slurm(environment)
    if not cluster:
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if len(missing) == 3:
            return {} if _on_cloud_tpu(environment) else None
        if num_processes == 1 and not process_id:
            return None
        if missing:
            raise UserError(
                f"{' and '.join(missing)} must be given too: neither Slurm nor Open MPI started this process, so "
                f"--coordinator=HOST:PORT, --num_processes and --process_id are needed together"
            )
    count = num_processes if num_processes is not None else cluster["num_processes"]
    number = process_id if process_id is not None else cluster["process_id"]
    if not 0 <= number < count:
        raise UserError(f"--process_id is {number}; with {count} processes it must be from 0 to {count - 1}")
    if count == 1:
        return None
    found: dict[str, Any] = {"num_processes": count, "process_id": number}
    if coordinator is not None:
        found["coordinator_address"] = coordinator
    elif open_mpi and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError(
            "Open MPI 5 does not say on which host process 0 runs: give --coordinator=HOST:PORT, the rest is known"
        )
    local = cluster.get("local_device_ids")
    if local is not None:
        found["local_device_ids"] = local
    if "coordinator_address" in found:
        found["cluster_detection_method"] = "deactivate"  # everything is known
    return found


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what srun says of this task; nothing outside of one, or in a step of one task."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in needed) or int(environment["SLURM_NTASKS"]) == 1:
        return {}
    found: dict[str, Any] = {
        "num_processes": int(environment["SLURM_NTASKS"]),
        "process_id": int(environment["SLURM_PROCID"]),
        "local_device_ids": [int(environment["SLURM_LOCALID"])],
    }
    # JAX takes one GPU a task; a task that has a node to itself shall use them all.
    if re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        found["local_device_ids"] = list(range(int(environment.get("SLURM_GPUS_ON_NODE", "1"))))
    return found


def _open_mpi(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what mpirun says of this process; nothing outside of one, or where it started one alone."""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) == 1:
        return {}
    return {
        "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
        "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
        "local_device_ids": [int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])],
    }


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips that the run may use. JAX, when imported, notes in the environment if not."""
    return (
        "TPU_SKIP_MDS_QUERY" not in environment
        and importlib.util.find_spec("libtpu") is not None
        and (environment.get("JAX_PLATFORMS") or "tpu").partition(",")[0] == "tpu"
    )


# ---- speech ----------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def gather(value: Any) -> list[Any]:
    """Returns the values that all processes give, in the order of the processes. They are small, and JSON."""
    if jax.process_count() == 1:
        return [value]
    topic = f"vit_scaling/{next(_conversation)}"
    _client().key_value_set(f"{topic}/{jax.process_index()}", json.dumps(value))
    try:
        _client().wait_at_barrier(topic, int(WAIT_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise TransientError(
            f"not all of the {jax.process_count()} processes reached this point within {WAIT_SECONDS:.0f} s of this "
            f"one; their logs say why: {str(error).splitlines()[0]}"
        ) from error
    answers = {int(key.rpartition("/")[2]): text for key, text in _client().key_value_dir_get(topic)}
    return [json.loads(answers[process]) for process in range(jax.process_count())]


def tell(value: Any) -> Any:
    """Returns, in every process, the value of process 0; what the others give is not looked at."""
    if jax.process_count() == 1:
        return value
    topic = f"vit_scaling/{next(_conversation)}"
    if is_first():
        _client().key_value_set(topic, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(topic, int(WAIT_SECONDS * 1000)))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes all processes fail where one does: each raises its own error, or names the process that had one.

    What is done inside must not wait for other processes.

    Raises:
        UserError: another process failed with one; the sentence is its own.
        TransientError: another process failed with any other error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    own = None if failure is None else [str(failure) or type(failure).__name__, isinstance(failure, UserError)]
    answers = gather(own)
    if failure is not None:
        raise failure
    for process, answer in enumerate(answers):
        if answer is not None:
            sentence, from_user = answer
            raise (UserError if from_user else TransientError)(f"process {process}: {sentence}")


def first(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0 alone and returns its result, which must be JSON, in all.

    Raises:
        Exception: what it raised, in process 0.
        UserError: the same sentence, in the others.
    """
    value = None
    with together():
        if is_first():
            value = function()
    return tell(value)


def leave(code: int) -> NoReturn:
    """Exits after an error of which the others may not know.

    One process exits as usual. Of several, none waits for the others: jax.distributed would, for minutes. Process 0
    gives them time to say what they have to, as they end with the coordinator.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    if is_first():
        time.sleep(2.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    from jax._src import distributed  # no public name leads to the coordinator's key-value store

    return distributed.global_state.client
