"""Claims of the five papers in miniature, on Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747).

    apt-get install dataset-fashion-mnist
    ./run.sh study --config=configs/claims.py:pool --workdir=studies/claims

Takes the name of a claim, or `all`, which runs them in order; the command continues where it was stopped. Names:
adafactor, augmented, decay, heads, kernel, pool, position, pruning, replaced, sasa, size, swin_position, swin_shift,
swin_v2. `smoke` tries one on the built-in digits in seconds; its verdict means nothing.

Every variant runs with three seeds and is measured on the 10,000 test images. ViTs and Swins see 57,000 training images
once unless stated, residual networks 20,000 and attention-CNNs 57,000 at 16 x 16 pixels. Each family has one learning
rate, which was not tuned for any variant.
"""

import dataclasses
import functools

from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models.attention_cnn import AttentionCNNConfig
from vit_scaling.models.resnet import ResNetConfig
from vit_scaling.models.swin import SwinConfig
from vit_scaling.models.vit import ViTConfig
from vit_scaling.studies import measures
from vit_scaling.studies.claims import Claim, ClaimsConfig, Expectation

VIT = "Scaling Vision Transformers (arXiv 2106.04560)"
SASA = "Stand-alone self-attention (arXiv 1906.05909)"
SWIN = "Swin Transformer (arXiv 2103.14030)"
CORDONNIER = "On the relationship between self-attention and convolutional layers (arXiv 1911.03584)"
SWIN_V2 = "Swin Transformer V2 (arXiv 2111.09883)"
AUGMENTED = "Attention augmented convolutional networks (arXiv 1904.09925)"
FEWSHOT = ("test/accuracy", "fewshot/10shot")
FASHION = functools.partial(SourceConfig, "idx", "/usr/share/datasets/fashion-mnist")


def get_config(arg: str | None = None) -> ClaimsConfig:
    arguments = c.arguments(arg, variants=(*CLAIMS, "all"), default="pool")
    if arguments.smoke:
        if arguments.variant == "all":
            raise UserError("configs/claims.py:all takes no smoke; name one claim")
        return ClaimsConfig((_smoke(CLAIMS[arguments.variant]()),), seeds=(0, 1))
    names = CLAIMS if arguments.variant == "all" else (arguments.variant,)
    return ClaimsConfig(tuple(CLAIMS[name]() for name in names))


def _smoke(claim: Claim) -> Claim:
    """Returns the claim with runs of seconds on the built-in digits."""
    variants = {name: c.smoke(config, config.model) for name, config in claim.variants.items()}
    metrics = tuple(metric.replace("10shot", "5shot") for metric in claim.metrics)
    expects = tuple(dataclasses.replace(each, metric=each.metric.replace("10shot", "5shot")) for each in claim.expects)
    return dataclasses.replace(claim, variants=variants, metrics=metrics, expects=expects)


def _config(model: c.ModelConfig, *, optim: c.OptimConfig, fewshot: bool = False, images: int = 57_000) -> c.Config:
    plain = TransformConfig(size=(28, 28), crop="none")
    shots = c.FewShotConfig(train=FASHION("train[:10%]"), test=FASHION("test"), transform=plain, shots=(10,), seeds=5)
    return c.Config(
        model=model,
        data=DataConfig(
            train=FASHION("train[:95%]"),
            transform=TransformConfig(size=(28, 28), crop="pad", pad=2, flip=0.5),
            eval_transform=plain,
            batch_size=100,
        ),
        duration=c.Duration(images, "examples"),
        optim=optim,
        schedule=c.ScheduleConfig(
            kind="rsqrt",
            warmup=c.Duration(images // 10, "examples"),
            timescale=c.Duration(images // 4, "examples"),
            cooldown=c.Duration(images // 4, "examples"),
        ),
        evaluation=c.EvaluationConfig(
            every=c.Duration(1, "epochs"),  # and at the end
            test=FASHION("test"),
            fewshot=shots if fewshot else None,
            batch_size=500,
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs"), keep=1),
        log=c.LogConfig(every=c.Duration(5_000, "examples")),
    )


def _vit(depth: int = 3, fewshot: bool = True, images: int = 57_000, pool: str = "map", **optim: object) -> c.Config:
    width = 16 * depth
    model = ViTConfig(width=width, depth=depth, mlp=4 * width, heads=depth, patch=(7, 7), pool=pool)
    # The fields are typed where they are declared; here they pass through.
    recipe: dict = {"name": "adafactor", "lr": 2e-3, "weight_decay": 0.03, "head_weight_decay": 3.0, **optim}
    return _config(model, optim=c.OptimConfig(**recipe), fewshot=fewshot, images=images)


def _small(config: c.Config) -> c.Config:
    """Returns the experiment on images of 16 x 16 pixels, a third of the cost, and with twice as many steps."""
    config.data.transform = TransformConfig(size=(16, 16), crop="random", resize_to=18, resize="area", flip=0.5)
    config.data.eval_transform = TransformConfig(size=(16, 16), crop="resize", resize="area")
    config.data.batch_size = 50
    return config


def _resnet(**fields: object) -> c.Config:
    values: dict = {"depth": 14, "width": 8, "stem": "small", "heads": 4, "kernel_size": 5, **fields}
    optim = c.OptimConfig(name="adam", lr=3e-3, weight_decay=0.03, head_weight_decay=0.03)
    return _small(_config(ResNetConfig(**values), optim=optim, images=20_000))


def _swin(freeze: tuple[str, ...] = (), images: int = 57_000, **fields: object) -> c.Config:
    values: dict = {"width": 24, "depths": (4, 2), "heads": (2, 4), "window": 2, "patch": 4, "drop_path": 0.0, **fields}
    optim = c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.03, head_weight_decay=0.03, freeze=freeze)
    return _config(SwinConfig(**values), optim=optim, images=images)


# ---- claims ----------------------------------------------------------------------------------------------------------


def adafactor() -> Claim:
    return Claim(
        name="adafactor",
        source=f"{VIT}, section 3.4",
        says="The modified Adafactor is on par with Adam at half of its optimizer memory.",
        variants={"adafactor": _vit(), "adam": _vit(name="adam")},
        expects=tuple(Expectation("adafactor", "equal to", "adam", metric) for metric in FEWSHOT),
        metrics=FEWSHOT,
        minutes=3,
    )


def decay() -> Claim:
    heads, bodies = (0.03, 0.3, 3.0, 10.0), (0.003, 0.03, 0.3, 1.0)
    variants = {
        f"head {head:g}, body {body:g}": _vit(head_weight_decay=head, weight_decay=body)
        for head in heads
        for body in bodies
    }
    strong, weak = "head 3, body 0.03", "head 0.03, body 0.03"
    return Claim(
        name="decay",
        source=f"{VIT}, section 3.1, figure 5",
        says="A strong decay of the head raises few-shot accuracy and lowers upstream accuracy.",
        variants=variants,
        expects=(Expectation(strong, "above", weak, FEWSHOT[1]), Expectation(strong, "below", weak, FEWSHOT[0])),
        metrics=FEWSHOT,
        minutes=30,
    )


def pool() -> Claim:
    pools = ("token", "gap", "map")
    return Claim(
        name="pool",
        source=f"{VIT}, section 3.2, figure 5",
        says="With a strong decay of the head, class token, GAP and MAP reach the same few-shot accuracy.",
        variants={name: _vit(pool=name) for name in pools},
        expects=(
            Expectation("gap", "equal to", "token", FEWSHOT[1]),
            Expectation("map", "equal to", "token", FEWSHOT[1]),
        ),
        metrics=FEWSHOT,
        minutes=5,
    )


def size() -> Claim:
    counts = (14_000, 57_000)
    variants = {
        f"depth {depth}, {images:,} images": _vit(depth, images=images) for depth in (1, 2, 4) for images in counts
    }
    pairs = [(f"depth 4, {images:,} images", f"depth 1, {images:,} images") for images in counts]
    return Claim(
        name="size",
        source=f"{VIT}, section 2",
        says="Larger models are more sample efficient: they reach a lower error from the same number of images.",
        variants=variants,
        expects=tuple(Expectation(large, "above", small, metric) for large, small in pairs for metric in FEWSHOT),
        metrics=FEWSHOT,
        minutes=13,
    )


def sasa() -> Claim:
    variants = {
        "convolution": _resnet(),
        "attention": _resnet(spatial="attention"),
        "convolution, then attention": _resnet(spatial="attention", groups=(3, 4)),
    }
    return Claim(
        name="sasa",
        source=f"{SASA}, tables 1 and 3",
        says="Attention equals convolution with fewer parameters; convolution early and attention late beats both.",
        variants=variants,
        expects=(
            Expectation("attention", "equal to", "convolution"),
            Expectation("convolution, then attention", "above", "convolution"),
            Expectation("convolution, then attention", "above", "attention"),
        ),
        minutes=24,
    )


def kernel() -> Claim:
    return Claim(
        name="kernel",
        source=f"{SASA}, table 4",
        says="A neighborhood of 3 x 3 is worse than larger ones; the gain levels off.",
        variants={f"kernel {side}": _resnet(spatial="attention", kernel_size=side) for side in (3, 5, 7)},
        expects=(
            Expectation("kernel 5", "above", "kernel 3"),
            Expectation("kernel 7", "above", "kernel 3"),
            Expectation("kernel 7", "equal to", "kernel 5"),
        ),
        minutes=16,
    )


def position() -> Claim:
    return Claim(
        name="position",
        source=f"{SASA}, tables 5 and 6",
        says="Relative positions beat absolute ones, which beat none; relative positions alone, without content, lose "
        "little.",
        variants={
            "content and relative": _resnet(spatial="attention"),
            "content and absolute": _resnet(spatial="attention", position="absolute"),
            "content": _resnet(spatial="attention", position="none"),
            "relative": _resnet(spatial="attention", content=False),
        },
        expects=(
            Expectation("content and relative", "above", "content and absolute"),
            Expectation("content and absolute", "above", "content"),
            Expectation("content and relative", "above", "relative"),
        ),
        minutes=18,
    )


def swin_shift() -> Claim:
    return Claim(
        name="swin_shift",
        source=f"{SWIN}, table 4",
        says="Without the shift of windows accuracy falls.",
        variants={"shifted": _swin(), "not shifted": _swin(shifted=False)},
        expects=(Expectation("shifted", "above", "not shifted"),),
        minutes=7,
    )


def swin_position() -> Claim:
    # A table that is not trained stays at its initial values, of deviation 0.02: next to nothing in a softmax.
    without = (".*/relative_position_bias_table",)
    variants = {
        "relative": _swin(window=4),
        "absolute": _swin(without, window=4, absolute_position=True),
        "none": _swin(without, window=4),
    }
    return Claim(
        name="swin_position",
        source=f"{SWIN}, table 4",
        says="A relative position bias beats absolute positions, which beat none.",
        variants=variants,
        expects=(Expectation("relative", "above", "absolute"), Expectation("absolute", "above", "none")),
        minutes=8,
    )


def augmented() -> Claim:
    wide = {"heads": 2, "key_fraction": 0.5, "value_fraction": 0.5}
    return Claim(
        name="augmented",
        source=f"{AUGMENTED}, table 1; Non-local neural networks (arXiv 1711.07971), table 2",
        says="Attention in place of some channels of a convolution gains, and so does a non-local block.",
        variants={
            "convolution": _resnet(),
            "augmented": _resnet(spatial="augmented", groups=(2, 3, 4), **wide),
            "non-local": _resnet(nonlocal_after=(2, 3)),
        },
        expects=(Expectation("augmented", "above", "convolution"), Expectation("non-local", "above", "convolution")),
        minutes=6,
    )


def _gaussian(position: str, images: int = 57_000) -> c.Config:
    model = AttentionCNNConfig(position=position, width=32, depth=4, heads=9, mlp=64, dropout=0.0)
    optim = c.OptimConfig(name="adam", lr=3e-3, weight_decay=1e-3, head_weight_decay=1e-3)
    return _small(_config(model, optim=optim, images=images))


def heads() -> Claim:
    metrics = ("heads/off_grid", "heads/one_token", "heads/shifts", "test/accuracy")
    start, end = "after 1,000 images", "trained"
    return Claim(
        name="heads",
        source=f"{CORDONNIER}, section 4.2, figures 3 and 4",
        says="In the early layers heads with quadratic positions settle on a grid of different shifts.",
        variants={start: _gaussian("quadratic", images=1_000), end: _gaussian("quadratic")},
        expects=(
            Expectation(end, "below", start, "heads/off_grid"),
            Expectation(end, "above", start, "heads/one_token"),
        ),
        metrics=metrics,
        measure=measures.heads,
        minutes=9,
    )


def pruning() -> Claim:
    general, round_ = "general Gaussians", "round Gaussians"
    return Claim(
        name="pruning",
        source=f"{CORDONNIER}, section 4.2, and its published code",
        says="Heads whose Gaussian is nearly singular can be pruned; accuracy stays, and is that of round Gaussians.",
        variants={general: _gaussian("gaussian"), round_: _gaussian("quadratic")},
        expects=(
            Expectation(general, "above", 0.0, "pruned/heads"),  # or there is nothing to say
            Expectation(general, "equal to", 0.0, "pruned/accuracy_change"),
            Expectation(general, "equal to", round_),
        ),
        metrics=("test/accuracy", "pruned/heads", "pruned/accuracy_change"),
        measure=measures.pruned,
        minutes=6,
    )


def replaced() -> Claim:
    return Claim(
        name="replaced",
        source=f"{CORDONNIER}, theorem 1",
        says="Attention layers that replace the convolutions of a trained network keep its predictions.",
        variants={"convolution": _resnet()},
        expects=(Expectation("convolution", "equal to", 0.0, "replaced/changed"),),
        metrics=("test/accuracy", "replaced/layers", "replaced/changed", "replaced/logit"),
        measure=measures.replaced,
        minutes=2,
    )


def swin_v2() -> Claim:
    fields = {"depths": (8, 2), "window": 4}
    return Claim(
        name="swin_v2",
        source=f"{SWIN_V2}, section 3 and table 1",
        says="Norms at the end of the branches bound activations with depth; a continuous position bias carries to "
        "another window better than a table resized bicubically.",
        variants={f"V{version}": _swin(images=28_000, version=version, **fields) for version in (1, 2)},
        expects=(
            Expectation("V2", "below", "V1", "activations/growth"),
            Expectation("V2", "above", "V1", "window/accuracy_change"),
        ),
        metrics=("test/accuracy", "activations/growth", "window/accuracy_change"),
        measure=functools.partial(measures.swin_v2, window=7),
        minutes=5,
    )


CLAIMS = {
    claim.__name__: claim
    for claim in (
        *(adafactor, pool, size, decay, sasa, kernel, position),
        *(heads, pruning, replaced, swin_shift, swin_position, swin_v2, augmented),
    )
}
