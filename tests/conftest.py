"""House rules for every test: eight CPU devices, strict dtypes and ranks, shapes checked at run time."""

import os

# Before JAX starts. One process of eight devices serves the sharding tests; the others use the first device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jaxtyping

# Annotations such as Float[Array, "B L D"] become checks, in tests only.
jaxtyping.install_import_hook("vit_scaling", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
