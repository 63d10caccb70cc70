"""Do two configs, stored and new, describe the same run?"""

from typing import Any

# Fields that are younger than some runs: their value there, by the last part of the name.
BEFORE = {
    **{key: [0.5, 0.5, 0.5] for key in ("mean", "std")},
    "alpha": "white",
    "mlp_kind": "gelu",
    "teacher_labels": "soft",
    "temperature": 1.0,
    "norm": "layernorm",
    "rope": "dinov3",
    "spike_window": 128,
    **dict.fromkeys(("key_bias", "proj_bias", "mlp_bias", "content"), True),
    "position": "relative",  # of local attention; all other models always had theirs
}

# Where a run may differ from the one that began the workdir: nothing here changes what is computed, except that
# model.remat and model.scan change its rounding. (on_corrupt "skip" passes what "error" passes, so a run that stopped
# at a corrupt image can go on without it.)
MAY_CHANGE = (
    *("mesh", "evaluation", "checkpoint", "log", "export", "model.remat", "model.scan"),
    *("data.workers", "data.threads", "data.prefetch", "data.timeout", "data.on_corrupt"),
)


def differences(old: dict[str, Any], new: dict[str, Any], may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """Returns "field is A there and B here" for each field in which two configs (as dicts) differ, but `may_change`."""

    def flat(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {
            k: v for name, child in node.items() for k, v in flat(child, f"{prefix}.{name}" if prefix else name).items()
        }

    a, b = flat(old, ""), flat(new, "")

    def differ(field: str) -> bool:
        if field in a and field in b:
            return a[field] != b[field]
        # A field that came later: as in BEFORE, or else off, is what it was.
        value, name = a.get(field, b.get(field)), field.rpartition(".")[2]
        return value != BEFORE[name] if name in BEFORE else bool(value)

    return [
        f"{field} is {a.get(field)!r} there and {b.get(field)!r} here"
        for field in sorted(a.keys() | b.keys())
        if differ(field) and not any(field == f or field.startswith(f + ".") for f in may_change)
    ]
