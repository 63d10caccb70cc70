"""What is read, how it becomes a batch, and with how many readers."""

import dataclasses

from vit_scaling import UserError
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig

ON_CORRUPT = ("error", "skip")


@dataclasses.dataclass
class DataConfig:
    """The training set, its transforms and the input pipeline."""

    train: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    transform: TransformConfig = dataclasses.field(default_factory=TransformConfig)
    eval_transform: TransformConfig = dataclasses.field(
        default_factory=lambda: TransformConfig(crop="central", resize="area")
    )
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    batch_size: int = 1024
    """Examples in a step, over all processes."""
    repeats: int = 1
    """Repeated augmentation (arXiv 1901.09335): the number of differently augmented copies of each image in a row."""
    on_corrupt: str = "error"
    """What a corrupt image does: "error" stops the run and names it; "skip" logs it and takes the next record."""
    workers: int = 0
    """Worker processes on each host; 0 reads in threads of the training process."""
    threads: int = 2
    """Threads in each reading process."""
    prefetch: int = 4
    """Batches that are read ahead."""
    timeout: float = 600.0
    """Seconds after which a record that is still being read stops the run; the error names the record."""


def validate(data: DataConfig) -> None:
    """Raises UserError, naming the field, if the input pipeline cannot run with `data`."""
    for name, low in (("batch_size", 1), ("repeats", 1), ("workers", 0), ("threads", 1), ("prefetch", 1)):
        if (value := getattr(data, name)) < low:
            raise UserError(f"data.{name} is {value} and must be at least {low}")
    if not data.timeout > 0:
        raise UserError(f"data.timeout is {data.timeout:g} seconds and must be positive")
    if data.on_corrupt not in ON_CORRUPT:
        raise UserError(f"data.on_corrupt is {data.on_corrupt!r}; choose one of {', '.join(ON_CORRUPT)}")
