"""The train state, and the jitted functions over it, which `build` puts together.

Training and planning both call `build`, so what is planned is what runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vit_scaling import models, names
from vit_scaling.config import Config, GuardConfig
from vit_scaling.data import mixing
from vit_scaling.evaluation.network import Batch, Network, jit_in, network, to_float
from vit_scaling.interop import Weights
from vit_scaling.optim import losses, optimizer, schedule
from vit_scaling.parallel import sharding
from vit_scaling.parallel.sharding import Mesh
from vit_scaling.training import teacher

Metrics = dict[str, Array]

PATCH_KEY = 2**31  # folded into a step's key to draw the patch size; layers fold in small numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step reads and writes: nested dicts of arrays under the paths of the parameters.

    The fields are also filled with shapes and shardings, so comments give their types. Their names are the names under
    which checkpoints store them.
    """

    step: Any  # int32: updates attempted so far, skipped ones included; data order and schedule follow it alone
    params: Any  # nested dict
    statistics: Any  # nested dict: the batch_stats; empty for models without batch normalization
    opt_state: Any
    ema: Any  # Polyak average of params, where optim.ema is set; else None
    skipped: Any  # int32: updates left out: something was not finite, or the loss spiked
    skipped_in_row: Any  # int32: of those, how many since the last applied one
    teacher: Any = None  # (params, batch_stats) of the teacher, which never change, where loss.teacher is set
    spikes: Any = None  # {"losses" [window] of the last applied updates, "count"}, where guard.spike_deviation is set


@dataclasses.dataclass(frozen=True)
class Program(Network):
    """The jitted functions of a run: the evaluation functions of `Network`, and these two.

    init() -> state
    train_step(state, batch) -> (state, metrics); donates the state's memory
    """

    init: Callable[[], TrainState]
    train_step: Any
    state_shape: TrainState  # ShapeDtypeStructs with shardings
    teacher: Weights | None  # as it was read; `initial.begin` puts it into the state


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What init and the train step know before they see an array."""

    config: Config
    num_classes: int
    image_size: tuple[int, int]
    graphdef: Any
    optimizer: optax.GradientTransformation
    multiplier: Callable[[Any], Array]  # of the learning rate, by step
    probes: bool  # whether all but the classifier is frozen
    teacher: Any  # the module with shapes in place of arrays, or None


def build(config: Config, *, num_classes: int, total_steps: int, mesh: Mesh) -> Program:
    """Builds the functions of a run for a mesh, which may be of devices that are only described.

    Args:
        config: the experiment; its durations resolved to steps.
        num_classes: length of the logits.
        total_steps: the step at which the schedule ends.
        mesh: axes as `mesh.AXES`; one without devices gives shapes and shardings, and nothing that runs.

    Raises:
        UserError: a field, or the batch on this mesh, cannot work; the sentence names it.
    """
    sharding.check_batch(config.data.batch_size, mesh, config.optim.accumulate)
    image_size = config.data.transform.size
    new_model = functools.partial(models.build, config.model, image_size=image_size, num_classes=num_classes)
    # The graphdef holds no arrays, so shapes are enough to make it.
    model = jax.eval_shape(lambda key: new_model(key=key), jax.random.key(0))
    params_shape = models.split(model)[1]
    trained = {row.path for row in optimizer.describe(config.optim, params_shape) if not row.frozen}
    models.freeze_statistics(model, names.flatten(params_shape).keys() - trained)
    graphdef = models.split(model)[0]
    taught_by = teacher.read(config, num_classes)
    recipe = _Recipe(
        config,
        num_classes,
        image_size,
        graphdef,
        optimizer.create(config.optim, params_shape, models.width_ratio(config.model)),
        schedule.create(config.schedule, total_steps),
        probes=all(path.startswith("head/") for path in trained),
        teacher=None if taught_by is None else taught_by.abstract(),
    )
    state_shape = jax.eval_shape(functools.partial(_init, recipe))
    on = sharding.tree_shardings(state_shape, mesh)
    step_on = (on, sharding.replicated(mesh))
    evaluation = network(config.model, graphdef, num_classes=num_classes, loss=config.loss, mesh=mesh)
    return Program(
        **vars(evaluation),
        init=jit_in(mesh, config.model.dtype, _init, recipe, out_shardings=on),
        train_step=jit_in(mesh, config.model.dtype, _train_step, recipe, donate_argnums=0, out_shardings=step_on),
        state_shape=jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state_shape, on
        ),
        teacher=taught_by,
    )


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


def all_finite(tree: Any) -> Array:
    """Whether no leaf holds NaN or infinity.

    As one "and" of all leaves, the compiler would repeat that chain in every fusion that asks, one for each parameter,
    and compile for half as long again. It does not repeat a square root.
    """
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    count = sum((jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in floats), jnp.float32(0))
    return jnp.sqrt(count) == 0


def _keys(seed: int) -> tuple[Array, Array]:
    """Returns the keys of the initialization and of the steps; made inside a trace, so on the run's devices."""
    init_key, steps_key = jax.random.split(jax.random.key(seed))
    return init_key, steps_key


def _init(recipe: _Recipe) -> TrainState:
    config = recipe.config
    key = _keys(config.seed)[0]
    model = models.build(config.model, image_size=recipe.image_size, num_classes=recipe.num_classes, key=key)
    _, params, batch_stats = models.split(model)
    params["head"]["bias"] = jnp.full_like(params["head"]["bias"], config.loss.head_bias)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        statistics=batch_stats,
        opt_state=recipe.optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema is not None else None,
        skipped=zero,
        skipped_in_row=zero,
        # Its place in the state; `initial.begin` fills it.
        teacher=None
        if recipe.teacher is None
        else jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), models.split(recipe.teacher)[1:]),
        spikes=None
        if config.guard.spike_deviation is None
        else {"losses": jnp.full(config.guard.spike_window, jnp.nan), "count": zero},
    )


def _train_step(recipe: _Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    config = recipe.config
    mix_key, model_key = jax.random.split(jax.random.fold_in(_keys(config.seed)[1], state.step))
    labels = losses.targets(sharding.constrain(batch["label"]), recipe.num_classes)
    images, targets = mixing.mix(config.data.mixing, mix_key, to_float(config.model, batch["image"]), labels)
    if recipe.teacher is not None:
        # The same view, mixed with the same key, under the teacher's own normalisation.
        view = to_float(recipe.teacher.config, batch["image"])
        seen, _ = mixing.mix(config.data.mixing, mix_key, view, labels)
        taught_by = models.merge(models.split(recipe.teacher)[0], *state.teacher)
        targets = losses.teacher_targets(config.loss, taught_by(seen))

    loss, batch_stats, grads = _gradients(recipe, state, images, targets, model_key)
    gradient_norm = global_norm(grads)

    learning_rate = jnp.float32(config.optim.lr) * recipe.multiplier(state.step)
    direction, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda d: (-learning_rate * d).astype(d.dtype), direction)
    params = optax.apply_updates(state.params, updates)
    ema = None if config.optim.ema is None else optimizer.ema_update(state.ema, params, config.optim.ema)

    applied = all_finite((loss, gradient_norm, params, opt_state, batch_stats))
    applied, spikes = _without_spikes(config.guard, loss, applied, state.spikes)

    def if_applied(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)

    skipped_in_row = jnp.where(applied, 0, state.skipped_in_row + 1)
    state = TrainState(
        step=state.step + 1,
        params=if_applied(params, state.params),
        statistics=if_applied(batch_stats, state.statistics),
        opt_state=if_applied(opt_state, state.opt_state),
        ema=if_applied(ema, state.ema),
        skipped=state.skipped + jnp.where(applied, 0, 1),
        skipped_in_row=skipped_in_row,
        teacher=state.teacher,
        spikes=spikes,
    )
    metrics = {
        "loss": loss,
        "gradient_norm": gradient_norm,
        "parameter_norm": global_norm(state.params),
        "update_norm": jnp.where(applied, global_norm(updates), 0.0),
        "learning_rate": learning_rate,
        "skipped": state.skipped,
        "skipped_in_row": skipped_in_row,
    }
    if spikes is not None:
        metrics["loss_spikes"] = spikes["count"]
    return state, metrics


def _without_spikes(config: GuardConfig, loss: Array, applied: Array, spikes: Any) -> tuple[Array, Any]:
    """Returns (whether the update is applied, the new `TrainState.spikes`).

    An update is left out where the loss is more than `spike_deviation` standard deviations above the mean of the last
    `spike_window` losses of applied updates, once there are so many.
    """
    if config.spike_deviation is None:
        return applied, None
    window = spikes["losses"]
    limit = jnp.mean(window) + config.spike_deviation * jnp.std(window)
    spike = applied & (loss > limit)  # never above NaN, which fills the window at first
    applied = applied & ~spike
    moved = jnp.concatenate([window[1:], loss[None]])
    return applied, {
        "losses": jnp.where(applied, moved, window),
        "count": spikes["count"] + jnp.where(spike, 1, 0),
    }


def _gradients(recipe: _Recipe, state: TrainState, images: Array, targets: Array, key: Array) -> tuple[Array, Any, Any]:
    """Returns (mean loss, updated batch_stats, mean gradient); of a FlexiViT for the patch size that the key draws."""
    sides = getattr(recipe.config.model, "patches", ())
    if not sides:
        return _accumulated(recipe, None, state, images, targets, key)
    drawn = jax.random.randint(jax.random.fold_in(key, PATCH_KEY), (), 0, len(sides))
    # Gradients are taken inside of the branches: one program holds each size once, and memory for the largest alone.
    sizes = [functools.partial(_accumulated, recipe, (side, side)) for side in sides]
    return jax.lax.switch(drawn, sizes, state, images, targets, key)


def _accumulated(
    recipe: _Recipe, patch: tuple[int, int] | None, state: TrainState, images: Array, targets: Array, key: Array
) -> tuple[Array, Any, Any]:
    """Returns (mean loss, updated batch_stats, mean gradient), over `optim.accumulate` microbatches in turn."""
    value_and_grad = jax.value_and_grad(functools.partial(_loss, recipe, patch), has_aux=True)
    count = recipe.config.optim.accumulate
    if count == 1:
        (loss, batch_stats), grads = value_and_grad(state.params, state.statistics, images, targets, key)
        return loss, batch_stats, grads

    def add(carry: Any, microbatch: Any) -> tuple[Any, None]:
        loss, batch_stats, grads = carry
        (more_loss, batch_stats), more_grads = value_and_grad(state.params, batch_stats, *microbatch)
        return (
            loss + more_loss / count,
            batch_stats,
            jax.tree.map(lambda a, b: a + b / count, grads, more_grads),
        ), None

    start = (jnp.float32(0), state.statistics, jax.tree.map(jnp.zeros_like, state.params))
    inputs = (_microbatches(images, count), _microbatches(targets, count), jax.random.split(key, count))
    (loss, batch_stats, grads), _ = jax.lax.scan(add, start, inputs)
    return loss, batch_stats, grads


def _loss(
    recipe: _Recipe,
    patch: tuple[int, int] | None,
    params: Any,
    batch_stats: Any,
    images: Array,
    targets: Array,
    key: Array,
) -> tuple[Array, dict[str, Any]]:
    """Returns (mean loss, updated batch_stats) of the training forward pass; of a linear probe, that of evaluation.

    `patch` is the size of the patches where it is not the model's.
    """
    model = models.merge(recipe.graphdef, params, batch_stats)
    key_or_none = None if recipe.probes else key
    logits = model(images, key_or_none) if patch is None else model(images, key_or_none, patch)
    if recipe.config.loss.temperature != 1:
        logits = logits / recipe.config.loss.temperature
    return jnp.mean(losses.loss(recipe.config.loss, logits, targets)), models.statistics(model)


def _microbatches(x: Array, count: int) -> Array:
    """Returns x [B, ...] as [count, B / count, ...].

    Microbatch p holds the examples p, p + count, p + 2 count, ..., so each device keeps a share of every one.
    """
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
