"""House rules for every test: eight CPU devices, strict dtypes and ranks, shapes checked at run time."""

import atexit
import os
import shutil
import tempfile

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

import tests.typechecker  # noqa: F401  so that its name below can be found

# Annotations such as Float[Array, "B L D"] become checks, in tests only.
jaxtyping.install_import_hook("vit_scaling", "tests.typechecker.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
