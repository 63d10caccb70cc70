"""Residual networks whose spatial layer is a choice: convolution, local attention, or attention-augmented convolution.

ResNet v1.5 (He et al. 2016, stride in the 3x3), SASA (Ramachandran et al. 2019, arXiv 1906.05909), AA-ResNet (Bello et
al. 2019, arXiv 1904.09925), non-local blocks (Wang et al. 2018, arXiv 1711.07971).

The blocks of a group after its first have one shape: they are stacked under `blocks` and scanned. The scan returns each
layer's running statistics (batch_stats), which are then written back.
Shapes: B batch, H W image or map, C channels, D features, M classes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import layers, spatial, stack
from vit_scaling.ops import local
from vit_scaling.parallel.sharding import constrain

# Bottlenecks in each group; 26 and 38 take two and one from each group of 50 (SASA, section 4.1); 14 is for tests.
DEPTHS = {14: (1, 1, 1, 1), 26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
SPATIAL = ("convolution", "attention", "augmented")
# small: a 3x3 convolution at full resolution and no pool, for images of about 32 pixels.
STEMS = ("convolution", "attention", "small")
EXPANSION = 4


@dataclasses.dataclass
class ResNetConfig:
    """A residual network. Published forms: `spatial` attention with groups 1-4, augmented with groups 2-4."""

    depth: int = 50  # 14 | 26 | 38 | 50 | 101
    width: int = 64  # of the stem and of group 1's spatial layers; doubles with each group
    spatial: str = "convolution"  # convolution | attention | augmented: the k x k layer of the groups named next
    groups: tuple[int, ...] = (1, 2, 3, 4)  # those groups; the others have 3x3 convolutions (SASA, Table 3)
    stem: str = "convolution"  # convolution | attention | small
    nonlocal_after: tuple[int, ...] = ()  # groups that a non-local block follows
    heads: int = 8  # of local and of augmenting attention
    kernel_size: int = 7  # of local attention
    position: str = "relative"  # of local attention: relative | absolute | none (SASA, Table 5)
    content: bool = True  # False: local attention has no keys, only relative logits (SASA, Table 6)
    backend: str = "blocks"  # of local attention: blocks | shifts | pallas
    stem_heads: int = 4
    stem_mixtures: int = 8  # not in SASA; with 8 the FLOPs are those of its Table 1
    key_fraction: float = 0.2  # of a layer's channels: AA's kappa
    value_fraction: float = 0.1  # AA's upsilon
    pool_above: int = 14  # augmenting attention sees a map with a longer side at half its resolution
    bn_decay: float = 0.9
    bn_eps: float = 1e-5
    dtype: str = "float32"  # of the computation; parameters, norms and statistics are float32
    scan: bool | None = None  # True: a loop over one compiled block; False: unrolled; None: unrolled on GPUs alone
    remat: str = "dots"  # none | dots | full: what the backward pass recomputes
    # By channel, for images in [0, 1]: the model sees (image - mean) / std; by default [-1, 1].
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        choices = {"depth": tuple(DEPTHS), "spatial": SPATIAL, "stem": STEMS, "backend": local.BACKENDS}
        choices |= {"position": spatial.POSITIONS}
        choices |= {"dtype": layers.DTYPES, "remat": tuple(stack.REMAT_POLICIES)}
        positive = ("width", "heads", "stem_heads", "stem_mixtures")
        layers.check(self, choices=choices, positive=positive, rates=("bn_decay", "bn_eps"))
        for name, groups in (("groups", self.groups), ("nonlocal_after", self.nonlocal_after)):
            if any(group not in (1, 2, 3, 4) for group in groups):
                raise UserError(f"model.{name} is {groups}; a residual network has groups 1, 2, 3 and 4")
        if not self.content and self.position != "relative":
            raise UserError(f"model.content is False and model.position {self.position!r}: logits need one of the two")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size is {self.kernel_size}; local attention needs an odd, positive size")


def group_width(config: ResNetConfig, group: int) -> int:
    """Returns the channels of group 1..4's spatial layers; its blocks give four times as many."""
    return config.width * 2 ** (group - 1)


def spatial_kind(config: ResNetConfig, group: int) -> str:
    return config.spatial if group in config.groups else "convolution"


def map_sizes(config: ResNetConfig, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the height and width of the stem's result, which is group 1's map, and of groups 2, 3 and 4."""
    reduction = 1 if config.stem == "small" else 4
    sizes = [(-(-image_size[0] // reduction), -(-image_size[1] // reduction))]
    for _ in range(3):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def attends_to_half(config: ResNetConfig, size: tuple[int, int]) -> bool:
    """Whether augmenting attention on a map of this size sees it at half the resolution."""
    return max(size) > config.pool_above


class Bottleneck(nnx.Module):
    """1x1 down, the spatial layer, 1x1 up, each with its norm; the first of a group projects the shortcut."""

    def __init__(
        self, config: ResNetConfig, group: int, inputs: int, size: tuple[int, int], *, stride: int, key: PRNGKeyArray
    ):
        keys = jax.random.split(key, 4)
        width = group_width(config, group)
        norm = functools.partial(spatial.BatchNorm, decay=config.bn_decay, eps=config.bn_eps)
        self.down = spatial.Conv(inputs, width, 1, key=keys[0])
        self.norm1 = norm(width)
        self.spatial: Any = _spatial_layer(config, group, width, size, stride, keys[1])
        self.norm2 = norm(width)
        self.up = spatial.Conv(width, EXPANSION * width, 1, key=keys[2])
        # A block starts as its shortcut (Goyal et al. 2017, section 5.1).
        self.norm3 = norm(EXPANSION * width, zero_scale=True)
        entry = inputs != EXPANSION * width or stride > 1
        self.shortcut = spatial.Conv(inputs, EXPANSION * width, 1, key=keys[3], stride=stride) if entry else None
        self.shortcut_norm = norm(EXPANSION * width) if entry else None

    def spatial_input(self, x_BHWC: Array, train: bool = False) -> Array:
        return jax.nn.relu(self.norm1(self.down(x_BHWC), train))

    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H2 W2 E"]:
        x_BHWC = constrain(x_BHWC)
        y = jax.nn.relu(self.norm2(self.spatial(self.spatial_input(x_BHWC, train)), train))
        y = self.norm3(self.up(y), train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BHWC = self.shortcut_norm(self.shortcut(x_BHWC), train)
        return jax.nn.relu(x_BHWC + y)


def _spatial_layer(
    config: ResNetConfig, group: int, width: int, size: tuple[int, int], stride: int, key: PRNGKeyArray
) -> nnx.Module:
    kind = spatial_kind(config, group)
    if kind == "attention":
        return spatial.LocalAttention(
            width,
            config.heads,
            config.kernel_size,
            key=key,
            stride=stride,
            backend=config.backend,
            position=config.position,
            content=config.content,
        )
    if kind == "augmented":
        return spatial.AugmentedConv(
            width,
            config.heads,
            size,
            key=key,
            key_fraction=config.key_fraction,
            value_fraction=config.value_fraction,
            stride=stride,
            pool=attends_to_half(config, size),
        )
    return spatial.Conv(width, width, 3, key=key, stride=stride)


class Group(nnx.Module):
    """The bottlenecks on one map size: `entry`, which may reduce it, then `blocks`, stacked."""

    def __init__(self, config: ResNetConfig, group: int, inputs: int, size: tuple[int, int], *, key: PRNGKeyArray):
        entry_key, blocks_key, nonlocal_key = jax.random.split(key, 3)
        outputs, depth = EXPANSION * group_width(config, group), DEPTHS[config.depth][group - 1] - 1
        self.entry = Bottleneck(config, group, inputs, size, stride=1 if group == 1 else 2, key=entry_key)
        keys = jax.random.split(blocks_key, depth)
        block = lambda key: Bottleneck(config, group, outputs, size, stride=1, key=key)  # noqa: E731
        self.blocks = jax.vmap(block)(keys) if depth else None
        inserted = group in config.nonlocal_after
        self.non_local = (
            spatial.NonLocal(outputs, key=nonlocal_key, decay=config.bn_decay, eps=config.bn_eps) if inserted else None
        )
        self.depth = depth
        self.scan = config.scan
        self.remat = config.remat

    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H2 W2 E"]:
        def step(x_BHWC: Array, block: Bottleneck) -> tuple[Array, Any]:
            x_BHWC = block(x_BHWC, train)
            return x_BHWC, nnx.state(block, nnx.BatchStat) if train else {}

        x_BHWC, statistics = stack.rematerialize(step, self.remat, in_loop=False)(x_BHWC, self.entry)
        nnx.update(self.entry, statistics)
        if self.blocks is not None:
            x_BHWC, statistics = stack.scan_layers(step, x_BHWC, self.blocks, scan=self.scan, remat=self.remat)
            nnx.update(self.blocks, statistics)
        return x_BHWC if self.non_local is None else self.non_local(x_BHWC, train)


class ResNet(nnx.Module):
    """Stem, four groups, global mean, linear classifier."""

    def __init__(self, config: ResNetConfig, *, image_size: tuple[int, int], num_classes: int, key: PRNGKeyArray):
        stem_key, head_key, *group_keys = jax.random.split(key, 6)
        self.config = config
        sizes = map_sizes(config, image_size)
        self.stem: Any = _stem(config, stem_key)
        self.stem_norm = spatial.BatchNorm(config.width, decay=config.bn_decay, eps=config.bn_eps)
        inputs = config.width
        for group, group_key in enumerate(group_keys, start=1):
            setattr(self, f"group{group}", Group(config, group, inputs, sizes[group - 1], key=group_key))
            inputs = EXPANSION * group_width(config, group)
        self.head = layers.Linear(inputs, num_classes, key=head_key, kernel_init=layers.zeros)

    @property
    def groups(self) -> list[Group]:
        return [getattr(self, f"group{group}") for group in (1, 2, 3, 4)]

    def _stemmed(self, images_BHWC: Array, train: bool) -> Array:
        x_BHWC = constrain(images_BHWC).astype(jnp.dtype(self.config.dtype))
        x_BHWC = jax.nn.relu(self.stem_norm(self.stem(x_BHWC), train))
        if self.config.stem == "convolution":
            return spatial.max_pool(x_BHWC, 3, 2, 1)
        return spatial.max_pool(x_BHWC, 4, 4, 0) if self.config.stem == "attention" else x_BHWC

    def features(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B D"]:
        """Returns the mean over the last map, in float32."""
        x_BHWC = self._stemmed(images_BHWC, key is not None)
        for group in self.groups:
            x_BHWC = group(x_BHWC, key is not None)
        return jnp.mean(x_BHWC.astype(jnp.float32), axis=(1, 2))

    def __call__(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B M"]:
        """Returns logits over the M classes, in float32.

        A key means training: norms use the batch, and update their running statistics in place.
        """
        return self.head(self.features(images_BHWC, key))

    def attention_maps(self, images_BHWC: Float[Array, "B H W 3"]) -> dict[str, Array]:
        """Returns {"group/layer": weights} of every attention layer, in float32.

        Local attention gives [B, H, W, N, k, k], by offset; augmented convolution [B, N, H, W, H, W], and a non-local
        block ("group/nonlocal") [B, H, W, H, W].

        Raises:
            UserError: the network is all convolution.
        """
        maps = {name: layer.weights(x_BHWC) for name, (layer, x_BHWC) in self.attention_layers(images_BHWC).items()}
        if not maps:
            raise UserError("this network has convolutions only (spatial='convolution'): there is no attention to show")
        return maps

    def attention_layers(self, images_BHWC: Float[Array, "B H W 3"]) -> dict[str, tuple[Any, Array]]:
        """Returns {"group/layer": (module, its input)} of every attention layer, named as in `attention_maps`."""
        x_BHWC, found = self._stemmed(images_BHWC, False), {}
        for number, group in enumerate(self.groups, start=1):
            blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], group.blocks) for i in range(group.depth)]
            for layer, block in enumerate([group.entry, *blocks], start=1):
                if spatial_kind(self.config, number) != "convolution":
                    found[f"{number}/{layer}"] = block.spatial, block.spatial_input(x_BHWC)
                x_BHWC = block(x_BHWC, False)
            if group.non_local is not None:
                found[f"{number}/nonlocal"] = group.non_local, x_BHWC
                x_BHWC = group.non_local(x_BHWC, False)
        return found


def _stem(config: ResNetConfig, key: PRNGKeyArray) -> nnx.Module:
    if config.stem == "attention":
        return spatial.AttentionStem(config.width, config.stem_heads, config.stem_mixtures, key=key)
    size, stride = (7, 2) if config.stem == "convolution" else (3, 1)
    return spatial.Conv(3, config.width, size, key=key, stride=stride)
