"""The optimizer of a run: clipping, the scaling of gradients, decoupled weight decay and frozen parameters.

Scaling Vision Transformers (section 3.2) decays the kernel of the head a hundred times more than those of the body,
and nothing else. Decay follows AdamW's convention: a step subtracts lr * schedule * decay * parameter.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_scaling import UserError, names
from vit_scaling.optim import mup
from vit_scaling.optim.adafactor import factored_axes, scale_by_adafactor
from vit_scaling.optim.muon import reduced_axes, scale_by_muon

NAMES = ("adafactor", "adam", "sgd", "nesterov", "lion", "lamb", "muon")
DTYPES = ("bfloat16", "float32")
LARGEST = 1e30  # of a learning rate or weight decay: what float32 can still multiply
Tree = Any

# The first rule that matches a parameter's whole path decides which decay it gets.
DECAY_RULES: tuple[tuple[str, str], ...] = (
    (r"head/kernel", "head"),
    # Position tables, Swin V2's position network and its temperatures are not decayed.
    (r"(.*/)?cpb_mlp/.*", "none"),
    (r"(.*/)?(relative_position_bias_table|logit_scale|rel_row|rel_col)", "none"),
    (r"(.*/)?kernel", "body"),
    (r"(.*/)?(bias|scale|gamma|probe|position_embedding|class_token|registers|mask_token)", "none"),
    (r"(.*/)?layerscale.*", "none"),
    # Gaussian heads (attention_cnn); positions within the attention stem's blocks (resnet).
    (r"(.*/)?(centers|spreads|block_row|block_col|mixture)", "none"),
)


@dataclasses.dataclass
class OptimConfig:
    """How parameters are updated.

    Attributes:
        name: "adafactor" (the paper's), "adam", "sgd" (with momentum), "nesterov" (with Nesterov's), "lion" (arXiv
            2302.06675, with beta2 0.99), "lamb" (arXiv 1904.00962) or "muon" (module muon; Adam for all but matrices).
        lr: peak learning rate, at most 1e30.
        beta1: decay of the first moment; for "sgd" and "nesterov", of the momentum.
        beta2: decay of the second moment of "adam", "lamb" and "muon"; upper limit of "adafactor"'s; for "lion", decay
            of the momentum, while beta1 weighs it in the update.
        moment_dtype: dtype in which the first moment is stored, "bfloat16" or "float32".
        weight_decay: of the body, in AdamW's units (multiplied by the learning rate), at most 1e30.
        head_weight_decay: of the head, likewise.
        decay_rules: pairs of a regular expression and "head", "body" or "none"; the first that matches a parameter's
            whole path decides, and every parameter must match one.
        freeze: regular expressions; parameters whose whole path matches one are not trained.
        clip: largest global norm of the gradient of the trained parameters, or None.
        ema: decay of an exponential moving average of the parameters, or None.
        layer_decay: factor of the learning rate from one layer to the one below it, or None; see `layer_rates`.
        accumulate: number of microbatches into which the step divides a batch, adding up their gradients.
    """

    name: str = "adafactor"
    lr: float = 8e-4
    beta1: float = 0.9
    beta2: float = 0.999
    moment_dtype: str = "bfloat16"
    weight_decay: float = 0.03
    head_weight_decay: float = 3.0
    decay_rules: tuple[tuple[str, str], ...] = DECAY_RULES
    freeze: tuple[str, ...] = ()
    clip: float | None = 1.0
    ema: float | None = None
    layer_decay: float | None = None
    accumulate: int = 1


class Row(NamedTuple):
    """What the optimizer does with one parameter; Adafactor factors some, and Muon orthogonalises others."""

    path: str
    shape: tuple[int, ...]
    decay: float
    frozen: bool
    factored: bool
    orthogonalised: bool
    rates: tuple[float, float] = (1.0, 1.0)  # smallest and largest factor of the learning rate


def describe(config: OptimConfig, params: Mapping[str, Any], width_ratio: float = 1.0) -> list[Row]:
    """Returns one row for each parameter, in the tree's order.

    Args:
        params: nested dict of arrays or of anything with a `shape`.
        width_ratio: for muP, the width over that at which `optim.lr` was chosen; see module mup.

    Raises:
        UserError: an unknown choice, a number out of its bounds, a pattern that is no regular expression, a parameter
            that no decay rule matches, or a freeze pattern that matches no parameter.
    """
    _check(config)
    decays = {"head": config.head_weight_decay, "body": config.weight_decay, "none": 0.0}
    leaves = names.flatten(params)
    frozen_paths = set()
    for pattern in config.freeze:
        try:
            matched = {path for path in leaves if names.matches(pattern, path)}
        except UserError as error:
            raise UserError(f"optim.freeze: {error}") from None
        if not matched:
            raise UserError(
                f"optim.freeze: no parameter's whole path matches {pattern!r}; one is {next(iter(leaves))!r}"
            )
        frozen_paths |= matched
    rows = []
    for path, leaf in leaves.items():
        try:
            decay = decays[names.first_match(config.decay_rules, path)]
        except UserError as error:
            raise UserError(f"optim.decay_rules: {error}") from None
        frozen = path in frozen_paths
        factored = config.name == "adafactor" and factored_axes(path, leaf.shape) is not None
        muon = config.name == "muon" and not frozen and reduced_axes(path, leaf.shape) is not None
        rows.append(Row(path, tuple(leaf.shape), 0.0 if frozen else decay, frozen, factored and not frozen, muon))
    if all(row.frozen for row in rows):
        raise UserError(f"optim.freeze {config.freeze} matches every parameter; leave some to train")
    by_width = mup.rates(config.name, params, width_ratio)
    by_layer = {} if config.layer_decay is None else layer_rates(params, config.layer_decay)
    rates = {path: by_width[path] * by_layer.get(path, np.ones(1)) for path in by_width}
    return [row._replace(rates=(float(rates[row.path].min()), float(rates[row.path].max()))) for row in rows]


def layer_rates(params: Mapping[str, Any], decay: float) -> dict[str, np.ndarray]:
    """Returns {path: factor of the learning rate}, float32, that broadcasts against the parameter.

    With L layers, everything before the first block has decay^(L + 1), block i of 1..L has decay^(L + 1 - i), and
    everything after the last block has 1 (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254). A patch merging layer
    belongs to the last block of its stage. Stacked parameters have one factor for each layer.

    Raises:
        UserError: the parameters are not those of a ViT or Swin.
    """
    leaves = names.flatten(params)
    stacks: dict[str, tuple[int, int]] = {}  # prefix of a stack: its first layer, its layers
    total = 0
    for path, leaf in leaves.items():
        prefix = path.partition(names.STACK + "/")[0] if names.stacked_dims(path) else None
        if prefix is not None and prefix not in stacks and "extra_norm" not in path:
            pairs = f"/{names.STACK}/plain/" in f"/{path}" or f"/{names.STACK}/shifted/" in f"/{path}"
            stacks[prefix] = total, leaf.shape[0] * (2 if pairs else 1)
            total += stacks[prefix][1]
    return {path: _rate(path, leaf, decay, stacks, total) for path, leaf in leaves.items()}


def _rate(path: str, leaf: Any, decay: float, stacks: Mapping[str, tuple[int, int]], total: int) -> np.ndarray:
    root, rest = path.split("/")[0], path.partition(names.STACK + "/")[2]
    if root in ("embedding", "embedding_norm", "pre_norm", "position_embedding", "class_token", "registers"):
        layer: Any = 0
    elif root in ("norm", "pool", "pre_logits", "head"):
        layer = total + 1
    elif (prefix := path.removesuffix(rest).removesuffix(names.STACK + "/")) in stacks and rest:
        first, count = stacks[prefix]
        step = count // leaf.shape[0]
        layer = first + 1 + step * np.arange(leaf.shape[0]) + (1 if rest.startswith("shifted/") else 0)
    elif f"{root}/" in stacks:
        layer = sum(stacks[f"{root}/"])
    else:
        raise UserError(
            f"optim.layer_decay works for a ViT or Swin only: the parameter {path!r} belongs to no layer that it knows"
        )
    rate = np.asarray(decay ** (total + 1.0 - layer), np.float32)
    return rate.reshape(rate.shape + (1,) * (len(leaf.shape) - rate.ndim))


def create(config: OptimConfig, params: Mapping[str, Any], width_ratio: float = 1.0) -> optax.GradientTransformation:
    """Returns the optimizer, which turns gradients into a direction, for parameters like `params`.

    `update(grads, state, params)` gives `scaled gradient + decay * parameter` ("lamb" multiplies it by the trust ratio
    of each layer), zeros for frozen parameters. The learning rate is not part of it: the step subtracts
    `lr * schedule(step) * direction`, so the schedule follows the global step even when an update was skipped. Frozen
    parameters have no state.

    Args:
        params: nested dict of arrays or of anything with a `shape`; only paths and shapes are read.
        width_ratio: as `describe`; muP scales the gradient's part of the direction and not the decay, which is the same
            share of a parameter in each step at every width.

    Raises:
        UserError: as `describe`.
    """
    rows = describe(config, params, width_ratio)
    frozen = {row.path for row in rows if row.frozen}
    decay = {row.path: row.decay for row in rows}
    rates = {} if config.layer_decay is None else layer_rates(params, config.layer_decay)
    by_width = mup.rates(config.name, params, width_ratio)
    inner = _scaling(config)

    def trained(tree: Tree) -> Tree:
        return names.unflatten({path: leaf for path, leaf in names.flatten(tree).items() if path not in frozen})

    def init(params: Tree) -> optax.OptState:
        return inner.init(trained(params))

    def update(grads: Tree, state: optax.OptState, params: Tree = None) -> tuple[Tree, optax.OptState]:
        assert params is not None, "weight decay needs the parameters"
        kept = trained(grads)
        if config.clip is not None:
            clip = optax.clip_by_global_norm(config.clip)
            kept, _ = clip.update(kept, clip.init(kept))
        # optax's Adam and momentum add a float32 gradient to a bfloat16 moment and rely on promotion to float32.
        with jax.numpy_dtype_promotion("standard"):
            scaled, state = inner.update(kept, state)
        scaled, flat = names.flatten(scaled), names.flatten(params)
        if width_ratio != 1:
            scaled = {path: by_width[path] * leaf for path, leaf in scaled.items()}
        direction = {
            path: jnp.zeros_like(param) if path in frozen else scaled[path] + decay[path] * param
            for path, param in flat.items()
        }
        if config.name == "lamb":
            direction = {path: _trust_ratio(path, flat[path], direction[path]) * direction[path] for path in direction}
        direction |= {path: rate * direction[path] for path, rate in rates.items()}
        return names.unflatten(direction), state

    return optax.GradientTransformation(init, update)


def ema_update(ema: Tree, params: Tree, decay: float) -> Tree:
    """Returns decay * ema + (1 - decay) * params, leaf by leaf (Polyak averaging)."""
    return jax.tree.map(lambda average, param: average + (1.0 - decay) * (param - average), ema, params)


def _trust_ratio(path: str, param: Any, direction: Any) -> Any:
    """Returns LAMB's |parameter| / |direction| of each layer, 1 where either is 0 (arXiv 1904.00962, algorithm 2)."""
    axes = tuple(range(names.stacked_dims(path), param.ndim))
    squares = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True) for x in (param, direction))
    param_norm, norm = (jnp.sqrt(square) for square in squares)
    some = (param_norm > 0) & (norm > 0)
    return jnp.where(some, param_norm / jnp.where(some, norm, 1.0), 1.0)


def _scaling(config: OptimConfig) -> optax.GradientTransformation:
    dtype = jnp.dtype(config.moment_dtype)
    if config.name == "adafactor":
        return scale_by_adafactor(momentum=config.beta1, momentum_dtype=dtype, beta2_cap=config.beta2)
    if config.name == "adam":
        return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, mu_dtype=dtype)
    if config.name == "lamb":
        return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=1e-6, mu_dtype=dtype)
    if config.name == "muon":
        return scale_by_muon(b1=config.beta1, b2=config.beta2, mu_dtype=dtype)
    if config.name == "lion":
        return optax.scale_by_lion(b1=config.beta1, b2=config.beta2, mu_dtype=dtype)
    return optax.trace(decay=config.beta1, nesterov=config.name == "nesterov", accumulator_dtype=dtype)


def _check(config: OptimConfig) -> None:
    for name, choices in (("name", NAMES), ("moment_dtype", DTYPES)):
        if getattr(config, name) not in choices:
            raise UserError(f"optim.{name} is {getattr(config, name)!r}; choose one of {', '.join(choices)}")
    if config.layer_decay is not None and not 0 < config.layer_decay <= 1:
        raise UserError(f"optim.layer_decay is {config.layer_decay}; it must be above 0 and at most 1")
    for name in ("beta1", "beta2", "ema"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"optim.{name} is {value}; it must be at least 0 and below 1")
    for name in ("lr", "weight_decay", "head_weight_decay"):
        if not 0 <= getattr(config, name) <= LARGEST:
            raise UserError(f"optim.{name} is {getattr(config, name)}; it must be a number from 0 to {LARGEST:g}")
    if config.clip is not None and not 0 < config.clip < math.inf:
        raise UserError(f"optim.clip is {config.clip}; it must be a positive number, or None for no clipping")
    if config.accumulate < 1:
        raise UserError(f"optim.accumulate is {config.accumulate}; it must be at least 1")
    for pattern, target in config.decay_rules:
        if target not in ("head", "body", "none"):
            raise UserError(f"optim.decay_rules gives {pattern!r} the decay {target!r}; choose head, body or none")
