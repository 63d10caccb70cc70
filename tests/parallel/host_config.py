"""The config of test_processes.py and what happens to a process: --config=tests/parallel/host_config.py:FAULTS.

FAULTS are parts joined by ";", each process:what:step. "sigterm" and "sigkill" send that signal when the step is on
its way, "evaluation" sends SIGTERM when the evaluation after that step begins, "stranger" has another optax.
HOST_RECORDS names a folder in which each process notes which rows it read: <process>.json, {step: [checksum of each
image]}.
"""

import json
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import tiny
from vit_scaling import config as c
from vit_scaling.data import loader
from vit_scaling.parallel import sharding
from vit_scaling.training import loop, workdir


def get_config(arg: str | None = None) -> c.Config:
    sharding.MIN_SHARDED_SIZE = 64  # the tiny model's parameters are split too
    for fault in (arg or "").split(";"):
        if fault:
            process, what, step = fault.split(":")
            _plan(int(process), what, int(step))
    if "HOST_RECORDS" in os.environ:
        _record(Path(os.environ["HOST_RECORDS"]))
    # Many processes compile it: no average of parameters, no pooling by attention.
    return tiny.config(model=tiny.model(pool="gap"), optim=c.OptimConfig(name="adam", lr=3e-3), mesh=c.MeshConfig())


def checksum(image: np.ndarray) -> int:
    return zlib.crc32(image.tobytes())


def _plan(process: int, what: str, step: int) -> None:
    number = signal.SIGKILL if what == "sigkill" else signal.SIGTERM
    dispatched, measured, environment = loop.StepLog.dispatched, loop.measured, workdir.environment

    def fall(at: int) -> None:
        if at == step and jax.process_index() == process:
            if number == signal.SIGKILL:
                time.sleep(1.0)  # the others have noted the step before
            os.kill(os.getpid(), number)

    def at_step(self: Any, at: int, metrics: Any) -> None:
        dispatched(self, at, metrics)
        fall(at)

    def at_evaluation(state: Any) -> dict[str, Any]:
        fall(int(jax.device_get(state.step)))
        return measured(state)

    def other_versions() -> dict[str, Any]:
        facts = environment()
        if jax.process_index() == process:
            facts["versions"] |= {"optax": "0.1"}
        return facts

    if what == "stranger":
        workdir.environment = other_versions
    elif what == "evaluation":
        loop.measured = at_evaluation
    else:
        loop.StepLog.dispatched = at_step  # type: ignore[method-assign]


def _record(folder: Path) -> None:
    train_batches = loader.train_batches

    def noted(*args: Any, start_step: int, **options: Any) -> Any:
        batches = train_batches(*args, start_step=start_step, **options)
        path = folder / f"{jax.process_index()}.json"

        class Noted:
            close, summary, counts = batches.close, batches.summary, batches.counts

            def __iter__(self) -> Iterator[Any]:
                for step, batch in enumerate(batches, start=start_step + 1):
                    rows = json.loads(path.read_text()) if path.exists() else {}
                    rows[str(step)] = [checksum(image) for image in batch["image"]]
                    path.write_text(json.dumps(rows))
                    yield batch

        return Noted()

    loader.train_batches = noted
