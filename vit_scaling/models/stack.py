"""How a stack of equal layers runs: as a loop or unrolled, and what its backward pass computes again."""

from collections.abc import Callable
from typing import Any

import jax

from vit_scaling.ops import kernels


def _expensive(primitive: Any, *args: Any, **parameters: Any) -> bool:
    """Whether an operation is a product or a convolution with parameters, or cuDNN's attention.

    The backward pass of cuDNN's attention needs its result and a number for each row. Both are small.
    """
    if primitive is jax.lax.conv_general_dilated_p or primitive.name == "dot_product_attention_fwd_wrapper":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **parameters)


# What a block keeps for its backward pass: everything; what is expensive to compute again, which is its products with
# parameters, cuDNN's attention, the results of local attention and the statistics of its norms; nothing. Elementwise
# work is faster to repeat than to read from memory.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _expensive, jax.checkpoint_policies.save_only_these_names("attention", "norm")
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_layers(step: Callable, carry: Any, per_layer: Any, *, scan: bool | None, remat: str) -> tuple[Any, Any]:
    """Runs `step(carry, layer)` over stacked layers, as `jax.lax.scan` does.

    Args:
        step: one layer, (carry, layer) to (carry, output).
        carry: what goes from layer to layer.
        per_layer: arrays with a leading axis over layers.
        scan: True compiles one layer and loops over it, False unrolls all layers. None unrolls them on GPUs alone,
            where a loop writes zeros for what it keeps of each layer, and then copies it there.
        remat: a key of `REMAT_POLICIES`.
    """
    scan = kernels.platform() != "gpu" if scan is None else scan
    # XLA makes no loop of a single layer, such as the one pair of blocks in most of Swin's stages.
    looped = scan and jax.tree.leaves(per_layer)[0].shape[0] > 1
    return jax.lax.scan(rematerialize(step, remat, in_loop=looped), carry, per_layer, unroll=not scan)


def rematerialize(step: Callable, remat: str, *, in_loop: bool) -> Callable:
    """Returns the function with a backward pass that recomputes what the policy does not keep."""
    if remat == "none":
        return step
    # Inside a scan the loop itself keeps the recomputation apart from the forward pass; elsewhere a barrier does.
    return jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=not in_loop)
