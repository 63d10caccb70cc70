"""TFDS data sets that were prepared as ArrayRecord, read without TensorFlow."""

from typing import Any

from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, make_label, open_source, split_ranges
from vit_scaling.data.sources.array_record import describe_place


class TfdsSource:
    """A TFDS builder, prepared as ArrayRecord. Images stay encoded; features other than image and label are dropped.

    The features are called image and label, the label one class or a sequence of classes (multi-label).
    """

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(config.name, data_dir=config.data_dir)
        except tfds.core.DatasetNotFoundError:
            place = config.data_dir or "its default folder"
            raise UserError(f"TFDS knows no data set {config.name!r}, and there is none in {place}") from None
        features, splits = builder.info.features, builder.info.splits
        if not splits:
            folder = f" --data_dir={config.data_dir}" if config.data_dir else ""
            raise UserError(
                f"the TFDS data set {config.name!r} is not in {builder.data_dir}; prepare it once, where TensorFlow is "
                f"installed: `tfds build {config.name} --file_format=array_record{folder}`"
            )
        for name in ("image", "label"):
            if name not in features:
                raise UserError(
                    f"the TFDS data set {config.name!r} has no feature {name!r}, only {', '.join(features)}"
                )
        classes = features["label"]
        self.multi_label = hasattr(classes, "feature")  # a sequence holds the feature of its elements
        classes = classes.feature if self.multi_label else classes
        if not getattr(classes, "num_classes", None):
            raise UserError(f"the labels of the TFDS data set {config.name!r} are not classes but {classes}")
        split_ranges(config.split, {name: split.num_examples for name, split in splits.items()})  # better errors
        self.config = config
        self._slices = splits[config.split].file_instructions
        self.num_classes: int = classes.num_classes
        self.class_names: tuple[str, ...] | None = tuple(classes.names)
        try:
            self._records = builder.as_data_source(config.split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(f"the TFDS data set in {builder.data_dir} cannot be read at random: {error}") from None

    def __reduce__(self):
        return open_source, (self.config,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        label = record["label"]
        label = [int(x) for x in label] if self.multi_label else int(label)
        return {"image": record["image"], "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return describe_place(self._slices, index)
