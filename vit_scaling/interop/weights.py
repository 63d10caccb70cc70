"""A network's weights on the host, and what is wanted of them.

Weights are flat {path: array} (`names.flatten`) until a module is made of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_scaling import UserError, models, names
from vit_scaling.interop import imagenet21k
from vit_scaling.interop.normalisation import NAMED, Normalisation
from vit_scaling.models import ModelConfig, adapt, swin

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
    """The network that the weights are wanted for; a field that is None keeps what the weights have.

    Attributes:
        config: the model. It also settles what the file does not say (heads of an unusual ViT, GELU, norm_eps).
        image_size: height and width in pixels.
        num_classes: of the classifier; a number other than the file's starts it afresh, from zero.
        class_map: for each new class the file's class that it was, instead of a fresh classifier.
        trained_size: height and width in pixels of the images the weights were trained on, where the file leaves it
            open; `image_size` is the size they are wanted for.
        normalisation: of the input, in place of what the file says; see `normalisation.named`.
        ema: whether to take the average of the parameters that a .pth file holds beside them.
    """

    config: ModelConfig | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    class_map: Sequence[int] | None = None
    trained_size: tuple[int, int] | None = None
    normalisation: Normalisation | None = None
    ema: bool = False


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's arrays on the host, and what they belong to.

    Attributes:
        config: the model.
        image_size: height and width in pixels that its positions or windows belong to.
        num_classes: of its classifier; 0 of a backbone, which has none.
        leaves: {path: float32 array} of the parameters.
        running: {path: float32 array} of the batch statistics.
        layout: of the file that they came from.
        fresh_head: whether the classifier is new and zero.
        normalisation: of the input; None if unknown. `config.mean` and `config.std` are then [-1, 1]'s.
        class_names: of the classifier; None if unknown.
        assumed: fields of the model that the file leaves open, taken as its family has them.
        family: whose names and defaults the file has.
        notes: what was left out on the way, in plain words.
        antialias: whether the library that the weights come from resamples positions with antialiasing.
        loss: "softmax" makes probabilities of one class of the logits, "sigmoid" of each class by itself.
    """

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int
    leaves: Leaves
    running: Leaves
    layout: str
    fresh_head: bool
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    assumed: tuple[str, ...] = ()
    family: str = ""
    notes: tuple[str, ...] = ()
    antialias: bool = False
    loss: str = "softmax"

    def known_normalisation(self) -> Normalisation:
        """Returns the normalisation.

        Raises:
            UserError: it is unknown.
        """
        if self.normalisation is None:
            raise UserError(
                f"neither the weights nor a file beside them say which mean and std their images have; say it with "
                f"`weights import --normalisation=NAME`, NAME one of {', '.join(NAMED)} or six numbers"
            )
        return self.normalisation

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as a nested dict."""
        return names.unflatten(self.leaves)

    @property
    def statistics(self) -> dict[str, Any]:
        """The batch statistics as a nested dict."""
        return names.unflatten(self.running)

    def abstract(self) -> nnx.Module:
        """Returns the model with shapes in place of arrays."""
        return abstract(self.config, self.image_size, self.num_classes)

    def module(self) -> nnx.Module:
        """Returns the model, ready to be called."""
        arrays = jax.tree.map(jnp.asarray, (self.parameters, self.statistics))
        return models.merge(models.split(self.abstract())[0], *arrays)

    def with_head(self, kernel: np.ndarray, bias: np.ndarray) -> "Weights":
        """Returns the weights with another classifier of as many classes."""
        return dataclasses.replace(self, leaves=self.leaves | {"head/kernel": kernel, "head/bias": bias})

    def folded(self) -> "Weights":
        """Returns the same network for pixels in [0, 1]: mean and deviation become part of the patch kernel.

        ((x - mean) / std) K + b = x (K / std) + (b - sum(K mean / std)). Exact where no zeros are padded to the
        normalised pixels: ViTs, and Swins whose image is a whole number of patches.

        Raises:
            UserError: the normalisation is unknown, the network pads, or nothing can take up the mean.
        """
        found, config = self.known_normalisation(), self.config
        patch = (config.patch,) * 2 if isinstance(config, swin.SwinConfig) else getattr(config, "patch", None)
        if patch is None or (isinstance(config, swin.SwinConfig) and any(np.remainder(self.image_size, patch))):
            raise UserError(
                f"mean and std cannot be folded into a {type(config).__name__} for images of {self.image_size[0]}x"
                f"{self.image_size[1]} pixels: it pads normalised pixels with zeros"
            )
        holder = next((path for path in ("embedding/bias", "position_embedding") if path in self.leaves), None)
        if holder is None:
            raise UserError("mean and std cannot be folded: the patches have no bias and no learned positions")
        kernel = self.leaves["embedding/kernel"].astype(np.float64) / np.reshape(found.std, (3, 1))
        bias = -np.einsum("rcxd,x->d", kernel, found.mean)
        mean, std = NAMED["none"]
        return dataclasses.replace(
            self,
            config=dataclasses.replace(config, mean=mean, std=std),
            normalisation=dataclasses.replace(found, mean=mean, std=std, source=f"folded into the patches: {found}"),
            leaves=self.leaves
            | {"embedding/kernel": kernel.astype(np.float32), holder: (self.leaves[holder] + bias).astype(np.float32)},
        )

    def adapted(self, target: Target) -> "Weights":
        """Returns the weights for another network, image size or set of classes.

        Raises:
            UserError: no resizing leads there.
        """
        config = target.config or self._config_for(target.image_size)
        found = target.normalisation or self.normalisation
        if found is not None:
            config = dataclasses.replace(config, mean=found.mean, std=found.std)
        image_size = target.image_size or self.image_size
        leaves = adapt.adapt(
            self.leaves,
            self.config,
            self.image_size,
            target=config,
            target_image_size=image_size,
            antialias=self.antialias,
        )
        classes = self.num_classes
        if target.num_classes is not None or target.class_map is not None:
            classes = len(target.class_map or ()) if target.num_classes is None else target.num_classes
            leaves |= adapt.classes(leaves, classes, target.class_map)
        if target.num_classes == 0:
            raise UserError("num_classes is 0; a classifier has at least one class")
        if target.class_map is not None and not target.class_map:
            raise UserError("the class map is empty; it names one class of the weights for each new class")
        if target.class_map is not None:
            imagenet21k.check_map(target.class_map, self.num_classes)
        class_names = self.class_names if classes == self.num_classes else None
        if target.class_map is not None and self.class_names:
            class_names = tuple(self.class_names[index] for index in target.class_map)
        fresh = target.class_map is None and (self.fresh_head or classes != self.num_classes)
        return dataclasses.replace(
            self,
            config=config,
            image_size=image_size,
            num_classes=classes,
            leaves=leaves,
            fresh_head=fresh,
            normalisation=found,
            class_names=class_names,
            loss="sigmoid" if classes == 1 else self.loss,
        )

    def _config_for(self, image_size: tuple[int, int] | None) -> ModelConfig:
        """Returns the config of the same network at another image size."""
        if isinstance(self.config, swin.SwinConfig) and image_size not in (None, self.image_size):
            return swin.transfer(self.config, self.image_size, window=self.config.window)
        return self.config


def abstract(config: ModelConfig, image_size: tuple[int, int], num_classes: int) -> nnx.Module:
    """Returns a model with shapes in place of arrays."""

    def build() -> nnx.Module:
        return models.build(config, image_size=image_size, num_classes=num_classes, key=jax.random.key(0))

    return jax.eval_shape(build)


def of_module(model: nnx.Module) -> Weights:
    """Returns the arrays of a model, on the host.

    Raises:
        UserError: it is no model of this project.
    """
    config: Any = getattr(model, "config", None)
    size: Any = getattr(model, "image_size", None)
    if type(config) not in models.MODELS or size is None:
        raise UserError(f"a {type(model).__name__} is no model that models.build or interop.load made")
    return of_trees(config, size, *models.split(model)[1:])


def of_trees(
    config: ModelConfig, image_size: tuple[int, int], parameters: Mapping[str, Any], statistics: Mapping[str, Any]
) -> Weights:
    """Returns weights of this project's own nested dicts of arrays."""
    leaves, running = ({k: np.asarray(v) for k, v in names.flatten(t).items()} for t in (parameters, statistics))
    classes = leaves["head/kernel"].shape[1]
    found = Normalisation(config.mean, config.std, source="the model's config")
    return Weights(config, image_size, classes, leaves, running, "vit_scaling", False, found)
