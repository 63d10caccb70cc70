"""TFDS data sets that were prepared as ArrayRecord, read without TensorFlow."""

from typing import Any

from vit_scaling import UserError, paths
from vit_scaling.data.sources import SourceConfig, make_label, open_source, split_ranges
from vit_scaling.data.sources.array_record import describe_place

LABELS = ("label", "labels", "real_label")


class TfdsSource:
    """A TFDS builder, prepared as ArrayRecord. Images stay encoded; features other than image and label are dropped.

    The image is the feature called image, or the only image there is. The label is the feature that the config names,
    or else the one called label, labels or real_label (of imagenet2012_real), or the only feature of classes; a
    sequence of classes is multi-label.
    """

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        builder = _builder(config)
        features, splits = builder.info.features, builder.info.splits
        images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        self._image = _choose("image", ("image",), images, features, config)
        classes = {name: feature for name in features if (feature := _classes(features[name])) is not None}
        self._label = _choose("label", LABELS, list(classes), features, config, config.label)
        self.multi_label = features[self._label] is not classes[self._label]
        split_ranges(config.split, {name: split.num_examples for name, split in splits.items()})  # better errors
        self.config = config
        self._slices = splits[config.split].file_instructions
        self.num_classes: int = classes[self._label].num_classes
        self.class_names: tuple[str, ...] | None = tuple(classes[self._label].names)
        try:
            self._records = builder.as_data_source(config.split, decoders={self._image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(f"the TFDS data set in {builder.data_dir} cannot be read at random: {error}") from None

    def __reduce__(self):
        return open_source, (self.config,)

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return list(_builder(config).info.splits)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        label = record[self._label]
        label = [int(x) for x in label] if self.multi_label else int(label)
        return {"image": record[self._image], "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return describe_place(self._slices, index)


def _builder(config: SourceConfig) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir and str(paths.place(config.data_dir)))
    except tfds.core.DatasetNotFoundError:
        place = config.data_dir or "its default folder"
        raise UserError(f"TFDS knows no data set {config.name!r}, and there is none in {place}") from None
    if not builder.info.splits:
        folder = f" --data_dir={config.data_dir}" if config.data_dir else ""
        raise UserError(
            f"the TFDS data set {config.name!r} is not in {builder.data_dir}; prepare it once, where TensorFlow is "
            f"installed: `tfds build {config.name} --file_format=array_record{folder}`"
        )
    return builder


def _classes(feature: Any) -> Any:
    """Returns the ClassLabel of a feature that is one, or a sequence of them; None of any other feature."""
    inner = getattr(feature, "feature", feature)  # a sequence holds the feature of its elements
    return inner if getattr(inner, "num_classes", None) else None


def _choose(
    what: str, usual: tuple[str, ...], fitting: list[str], features: Any, config: SourceConfig, asked: str = ""
) -> str:
    """Returns the name of the feature that holds the image or the label."""
    names = ", ".join(features)
    if asked:
        if asked not in fitting:
            raise UserError(f"the TFDS data set {config.name!r} has no {what} feature {asked!r}, only {names}")
        return asked
    for name in usual:
        if name in features:
            if name not in fitting:
                raise UserError(f"the feature {name!r} of the TFDS data set {config.name!r} is {features[name]}")
            return name
    if len(fitting) != 1:
        raise UserError(
            f"the TFDS data set {config.name!r} has no feature {usual[0]!r}, only {names}"
            + (f"; choose one of {', '.join(fitting)} with the source's field {what}" if fitting else "")
        )
    return fitting[0]
