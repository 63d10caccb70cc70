"""The train state and the one function that builds the jitted steps over it.

Training and planning for a pod that is not here both call `build`, so what is planned is what runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vit_scaling import models
from vit_scaling.config import Config
from vit_scaling.data import mixing
from vit_scaling.optim import losses, schedule
from vit_scaling.optim import optimizer as chain
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.sharding import Mesh

Batch = dict[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step reads and writes: nested dicts of arrays, known by the paths of the parameters.

    JAX also makes it of their shapes and of their shardings, so the fields' types are said in words.
    """

    step: Any  # int32: updates attempted so far, skipped ones included; it alone drives data order and schedule
    params: Any  # nested dict
    statistics: Any  # nested dict: running statistics of batch normalisation; empty for other models
    opt_state: Any
    ema: Any  # Polyak average of params, where optim.ema is set; else None
    skipped: Any  # int32: updates left out because loss or gradient was not finite
    skipped_in_row: Any  # int32: of those, how many since the last finite one


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run, and the shapes (with shardings) that they were built for.

    init() -> state
    train_step(state, batch) -> (state, metrics); the state's memory is reused
    classify(params, statistics, batch) -> {"prediction", "correct", "loss", "mask"}, each [B] and whole on every device
    features(params, statistics, images) -> [B, D] in float32
    """

    init: Callable[[], TrainState]
    train_step: Any
    classify: Any
    features: Any
    state_shape: TrainState
    mesh: Any  # as given to `build`; what runs needs one of devices


def batch_shape(config: Config, num_classes: int, multi_label: bool, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training batch as the loader delivers it, sharded over the mesh."""
    on = sharding.batch_sharding(mesh)
    size = config.data.batch_size
    image = jax.ShapeDtypeStruct((size, *config.data.transform.size, 3), jnp.uint8, sharding=on)
    label_shape, label_type = ((size, num_classes), jnp.float32) if multi_label else ((size,), jnp.int32)
    return {"image": image, "label": jax.ShapeDtypeStruct(label_shape, label_type, sharding=on)}


def global_norm(tree: Any) -> Array:
    """Returns the L2 norm over all leaves; zero for none."""
    return jnp.sqrt(
        sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)), jnp.float32(0))
    )


def build(config: Config, *, num_classes: int, total_steps: int, mesh: Mesh) -> Program:
    """Builds the functions of a run for a mesh, which may be of devices that are not here.

    Args:
        config: the experiment; its durations resolved to steps.
        num_classes: length of the logits.
        total_steps: the step at which the schedule ends.
        mesh: axes as `mesh.AXES`; one without devices gives shapes and shardings, and nothing that runs.

    Raises:
        ValueError: a field, or the batch on this mesh, cannot work; the sentence names it.
    """
    sharding.check_batch(config.data.batch_size, mesh, config.optim.accumulate)
    image_size = config.data.transform.size
    multiplier = schedule.create(config.schedule, total_steps)

    def new_model(key: Array) -> Any:
        return models.build(config.model, image_size=image_size, num_classes=num_classes, key=key)

    def keys() -> tuple[Array, Array]:
        """Returns the keys of the initialisation and of the steps; made inside a trace, so on the run's devices."""
        init_key, steps_key = jax.random.split(jax.random.key(config.seed))
        return init_key, steps_key

    # The description of the model holds no arrays, so the shapes are enough to make it.
    description, params_shape, _ = models.split(jax.eval_shape(new_model, jax.random.key(0)))
    optimizer = chain.create(config.optim, params_shape)

    def to_float(images: Array) -> Array:
        return mixing.to_float(sharding.constrain(images), config.model.mean, config.model.std)

    def init() -> TrainState:
        _, params, statistics = models.split(new_model(keys()[0]))
        params["head"]["bias"] = jnp.full_like(params["head"]["bias"], config.loss.head_bias)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            statistics=statistics,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if config.optim.ema is not None else None,
            skipped=zero,
            skipped_in_row=zero,
        )

    def loss_and_statistics(
        params: Any, statistics: Any, images: Array, targets: Array, key: Array
    ) -> tuple[Array, dict[str, Any]]:
        model = models.merge(description, params, statistics)
        logits = model(images, key)
        return jnp.mean(losses.loss(config.loss, logits, targets)), models.statistics(model)

    def gradients(state: TrainState, images: Array, targets: Array, key: Array) -> tuple[Array, Any, Any]:
        """Returns mean loss, updated statistics and mean gradient, over `accumulate` parts of the batch in turn."""
        value_and_grad = jax.value_and_grad(loss_and_statistics, has_aux=True)
        parts = config.optim.accumulate
        if parts == 1:
            (loss, statistics), grads = value_and_grad(state.params, state.statistics, images, targets, key)
            return loss, statistics, grads

        def split(x: Array) -> Array:
            # Every device keeps a share of each part: part p takes examples p, p + parts, p + 2 parts, ...
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        def add_part(carry: Any, part: Any) -> tuple[Any, None]:
            loss, statistics, grads = carry
            (part_loss, statistics), part_grads = value_and_grad(state.params, statistics, *part)
            return (
                loss + part_loss / parts,
                statistics,
                jax.tree.map(lambda a, b: a + b / parts, grads, part_grads),
            ), None

        start = (jnp.float32(0), state.statistics, jax.tree.map(jnp.zeros_like, state.params))
        (loss, statistics, grads), _ = jax.lax.scan(
            add_part, start, (split(images), split(targets), jax.random.split(key, parts))
        )
        return loss, statistics, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mix_key, model_key = jax.random.split(jax.random.fold_in(keys()[1], state.step))
        images = to_float(batch["image"])
        targets = losses.targets(sharding.constrain(batch["label"]), num_classes)
        images, targets = mixing.mix(config.data.mixing, mix_key, images, targets)

        loss, statistics, grads = gradients(state, images, targets, model_key)
        gradient_norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

        learning_rate = jnp.float32(config.optim.lr) * multiplier(state.step)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda d: (-learning_rate * d).astype(d.dtype), direction)
        params = optax.apply_updates(state.params, updates)
        ema = None if config.optim.ema is None else chain.ema_update(state.ema, params, config.optim.ema)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        skipped_in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        state = TrainState(
            step=state.step + 1,
            params=if_finite(params, state.params),
            statistics=if_finite(statistics, state.statistics),
            opt_state=if_finite(opt_state, state.opt_state),
            ema=if_finite(ema, state.ema),
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_row=skipped_in_row,
        )
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "parameter_norm": global_norm(state.params),
            "update_norm": jnp.where(finite, global_norm(updates), 0.0),
            "learning_rate": learning_rate,
            "skipped": state.skipped,
            "skipped_in_row": skipped_in_row,
        }
        return state, metrics

    def classify(params: Any, statistics: Any, batch: Batch) -> Metrics:
        model = models.merge(description, params, statistics)
        logits = model(to_float(batch["image"]))
        targets = losses.targets(batch["label"], num_classes)
        prediction = jnp.argmax(logits, axis=-1)
        plain = dataclasses.replace(config.loss, label_smoothing=0.0)
        return {
            "prediction": prediction.astype(jnp.int32),
            "correct": jnp.take_along_axis(targets, prediction[:, None], axis=-1)[:, 0] > 0,
            "loss": losses.loss(plain, logits, targets),
            "mask": batch["mask"],
        }

    def features(params: Any, statistics: Any, images: Array) -> Array:
        return models.merge(description, params, statistics).features(to_float(images))

    def in_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        """Lets `constrain` see the mesh while the function is traced."""

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args)

        return traced

    state_shape = jax.eval_shape(init)
    state_shardings = sharding.tree_shardings(state_shape, mesh)
    everywhere = sharding.replicated(mesh)
    jit = functools.partial(jax.jit, compiler_options=mesh_lib.compiler_options(mesh))
    return Program(
        init=jit(in_mesh(init), out_shardings=state_shardings),
        train_step=jit(in_mesh(train_step), donate_argnums=0, out_shardings=(state_shardings, everywhere)),
        classify=jit(in_mesh(classify), out_shardings=everywhere),
        features=jit(in_mesh(features), out_shardings=everywhere),
        state_shape=jax.tree.map(
            lambda leaf, on: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), state_shape, state_shardings
        ),
        mesh=mesh,
    )
