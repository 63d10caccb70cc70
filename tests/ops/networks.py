"""What the tests of kernels share: a network with and without one, and lowered for a device that is only described."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from vit_scaling import models
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel.mesh import MeshConfig


def logits_and_gradients(config, image_size):
    """Returns a function that traces a network anew and returns its logits and the gradients of their squares' sum.

    All parameters differ from zero: else Swin V2's blocks would be the identity.
    """
    model = models.build(config, image_size=image_size, num_classes=3, key=jax.random.key(0))
    graphdef, parameters, _ = models.split(model)
    parameters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), parameters)
    images = jax.random.normal(jax.random.key(2), (2, *image_size, 3))

    def run():
        def loss(parameters):
            logits = models.merge(graphdef, parameters, {})(images)
            return jnp.sum(jnp.square(logits)), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(parameters)
        return logits, gradients

    return run


def assert_same(found, expected):
    (found_logits, found_gradients), (logits, gradients) = found, expected
    np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6 * largest)


def described(platform, **axes):
    """Returns a mesh of "gpu" or "tpu" devices that are only described."""
    kind, cores = {"tpu": ("TPU v5 lite", 1), "gpu": ("NVIDIA H200", None)}[platform]
    mesh = mesh_lib.create(MeshConfig(**axes), jax.devices()[: axes.get("model", 1)])
    device = AbstractDevice(kind, cores, platform)
    return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, mesh.axis_types, abstract_device=device)


def lowered_gradient(config, side, platform):
    """Returns the text of a network's gradient, for images of side x side pixels and one described device."""
    build = lambda key: models.build(config, image_size=(side, side), num_classes=3, key=key)  # noqa: E731
    graphdef, parameters, _ = models.split(jax.eval_shape(build, jax.random.key(0)))

    def loss(parameters, images):
        return jnp.sum(models.merge(graphdef, parameters, {})(images))

    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    with jax.sharding.use_abstract_mesh(described(platform)):
        traced = jax.jit(jax.grad(loss)).trace(parameters, images)
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()
