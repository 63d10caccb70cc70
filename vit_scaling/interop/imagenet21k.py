"""The three published numberings of ImageNet-21k, which networks and class files do not name.

Networks of 21,841, 21,842 and 21,843 classes are all called ImageNet-21k or -22k. A class map of one used with another
picks wrong classes, most of them by one or two places, and nothing fails. As timm lists them (timm/data/_info,
*_synsets.txt): 21,841 WordNet identifiers in order; Google's has two more, n03931044 and n09859684, at their places in
the order; Microsoft's (FocalNet) begins with the 1,000 classes of ImageNet-1k.
"""

from collections.abc import Sequence

from vit_scaling import UserError

NUMBERINGS = {
    21841: "ImageNet-21k in WordNet's order (Swin, timm's in22k)",
    21842: "ImageNet-21k with ImageNet-1k first (FocalNet)",
    21843: "ImageNet-21k as Google numbers it (AugReg, big_vision)",
}
# Where ImageNet-1k's classes 0 and 999 (n01440764 and n15075141) are in each: they tell a class file of ImageNet-1k.
_ENDS = {(359, 21815): 21841, (0, 999): 21842, (359, 21817): 21843}


def check_map(class_map: Sequence[int], num_classes: int) -> None:
    """Raises UserError if a class map is that of ImageNet-1k in another numbering than the weights'."""
    if num_classes not in NUMBERINGS or len(class_map) != 1000:
        return
    meant = _ENDS.get((class_map[0], class_map[-1]), num_classes)
    if meant != num_classes:
        raise UserError(
            f"the class map is one of {NUMBERINGS[meant]}, with {meant:,} classes, and the weights have "
            f"{num_classes:,}, {NUMBERINGS[num_classes]}: it would pick other classes"
        )
