"""A profile of some steps, for TensorBoard."""

import tempfile
from pathlib import Path

import jax

from vit_scaling import paths
from vit_scaling.config import LogConfig
from vit_scaling.parallel import processes


class Profiler:
    """Profiles the steps log.profile_from to log.profile_from + log.profile_steps - 1 into workdir/profile.

    A run that resumes inside the window profiles the rest of it; `close` writes a window that is still open.
    """

    def __init__(self, config: LogConfig, workdir: Path):
        first = config.profile_from if processes.is_first() else None
        self._window = range(0) if first is None else range(first, first + config.profile_steps)
        self._target = workdir / "profile"
        bucket = first is not None and paths.in_bucket(workdir)
        self._folder = Path(tempfile.mkdtemp(prefix="vit_scaling-")) if bucket else self._target
        self._tracing = False

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Returns the annotation under which a step is dispatched; starts or ends the profile at the window's edges."""
        if self._tracing and step not in self._window:
            self.close()
        if not self._tracing and step in self._window:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Writes the profile, if one was started."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            if self._folder != self._target:
                paths.upload(self._folder, self._target)
