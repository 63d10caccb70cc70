"""What each remat policy computes again, counted in the traced gradient of every model."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from vit_scaling import models
from vit_scaling.models import attention_cnn, resnet, stack, swin, vit
from vit_scaling.ops import attention, kernels

CASES = {
    "vit": (functools.partial(vit.ViTConfig, 16, 2, 16, 2, (8, 8)), 16),
    "vit in bfloat16": (functools.partial(vit.ViTConfig, 16, 2, 16, 2, (8, 8), dtype="bfloat16"), 16),
    "vit, swiglu and rope": (
        functools.partial(vit.ViTConfig, 16, 2, 16, 2, (8, 8), mlp_kind="swiglu", position="rope"),
        16,
    ),
    "swin": (functools.partial(swin.SwinConfig, width=8, depths=(2, 2), heads=(1, 2), window=2), 16),
    "swin v2": (functools.partial(swin.SwinConfig, 2, width=8, depths=(2, 2), heads=(1, 2), window=2), 16),
    "sasa": (functools.partial(resnet.ResNetConfig, 26, 16, "attention", heads=2, kernel_size=3), 32),
    "resnet": (functools.partial(resnet.ResNetConfig, 26, 16), 32),
    "attention cnn": (
        functools.partial(attention_cnn.AttentionCNNConfig, "learned+content", width=8, depth=2, heads=2, mlp=8),
        8,
    ),
}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        inside = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for sub in (getattr(value, "jaxpr", value) for value in inside):
            if hasattr(sub, "eqns"):
                yield from equations(sub)


@functools.cache
def counted(case, remat, scan=True):
    """Returns how many operations of each kind the gradient has, a scanned layer counted once."""
    make, side = CASES[case]
    config = make(remat=remat, scan=scan)
    build = lambda key: models.build(config, image_size=(side, side), num_classes=3, key=key)  # noqa: E731
    graphdef, parameters, statistics = models.split(jax.eval_shape(build, jax.random.key(0)))

    def loss(parameters, statistics, images):
        return jnp.sum(jnp.square(models.merge(graphdef, parameters, statistics)(images, jax.random.key(0))))

    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    count = collections.Counter()
    for equation in equations(jax.make_jaxpr(jax.grad(loss))(parameters, statistics, images).jaxpr):
        name = equation.primitive.name
        if name == "dot_general":
            name = "activations" if equation.params["dimension_numbers"][1][0] else "parameters"
        count["parameters" if name == "conv_general_dilated" else name] += 1
    return count


@pytest.mark.parametrize("case", CASES)
def test_the_default_computes_no_product_with_parameters_twice_and_repeats_elementwise_work(case):
    assert CASES[case][0]().remat == "dots"
    none, dots, full = (counted(case, remat) for remat in ("none", "dots", "full"))
    assert none["parameters"] == dots["parameters"] < full["parameters"]
    assert none["rsqrt"] < dots["rsqrt"]


@pytest.mark.parametrize(("scan", "length"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_a_barrier_keeps_the_recomputation_behind_the_forward_pass_where_no_loop_does(scan, length):
    """XLA makes no loop of a single layer, so a stack of one needs the barrier too."""

    def loss(x, kernels):
        step = lambda x, kernel: (jnp.sin(x @ kernel), None)  # noqa: E731
        return jnp.sum(jnp.square(stack.scan_layers(step, x, kernels, scan=scan, remat="full")[0]))

    shapes = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((length, 8, 8), jnp.float32)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).as_text()
    assert ("optimization_barrier" in program) == (not scan or length == 1)


def test_the_default_keeps_the_statistics_of_norms():
    """Softmax sums are the only sums of activations that it repeats: one for the block's attention."""
    assert counted("vit", "dots")["reduce_sum"] == counted("vit", "none")["reduce_sum"] + 1
    assert counted("vit", "full")["reduce_sum"] > counted("vit", "dots")["reduce_sum"] + 3


def test_the_default_does_not_compute_local_attention_a_third_time():
    """Its own backward pass recomputes logits, block by block; products of two activations are in it alone."""
    assert counted("sasa", "none")["activations"] == counted("sasa", "dots")["activations"]
    assert counted("sasa", "none")["activations"] < counted("sasa", "full")["activations"]


def test_the_default_does_not_run_the_attention_of_cudnn_twice(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "_refused_by_cudnn", lambda *_: None)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    counts = {remat: counted.__wrapped__("vit in bfloat16", remat) for remat in ("none", "dots", "full")}
    runs = {remat: count["dot_product_attention_fwd_wrapper"] for remat, count in counts.items()}
    assert runs == {"none": 1, "dots": 1, "full": 2}
    assert all(count["dot_product_attention_bwd_wrapper"] == 1 for count in counts.values())


def test_unrolled_layers_follow_the_same_policy():
    none, dots = (counted("vit", remat, scan=False) for remat in ("none", "dots"))
    assert none["parameters"] == dots["parameters"]
    assert none["rsqrt"] < dots["rsqrt"]
