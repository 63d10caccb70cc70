"""Settings of every test: eight CPU devices, strict dtypes and ranks, shapes checked at run time."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Before JAX starts. One process of eight devices serves the sharding tests; the others use the first device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# Tiny models are compiled far longer than they run: compile cheaply, and the same function once for all tests of a
# session, those in other processes included.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vit_scaling_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  so that its name below can be found

# Annotations such as Float[Array, "B L D"] become checks, in tests only.
jaxtyping.install_import_hook("vit_scaling", "tests.typechecker.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def constants_stay() -> Iterator[None]:
    """Fails a test file that leaves a constant of the package changed, and with it what later files test."""
    before = _constants()
    yield
    changed = [name for name, value in _constants().items() if before.get(name, value) is not value]
    assert not changed, f"this file changed {changed}"


def _constants() -> dict[str, object]:
    return {
        f"{path}.{name}": value
        for path, module in list(sys.modules.items())
        if path.startswith("vit_scaling.")
        for name, value in list(vars(module).items())
        if name.isupper()
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    """Says in one last line which tests need a browser that is not here; the workers of xdist leave it to the first."""
    from tests.pages import browser

    if browser.find() is None and not hasattr(config, "workerinput") and not config.option.collectonly:
        print(
            "not run: the tests that open pages in a browser (tests/pages); install Debian's or Ubuntu's chromium, "
            "or set CHROMIUM to the path of a Chromium or Chrome"
        )
