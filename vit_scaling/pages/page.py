"""Puts a page together: one HTML file with its styles, scripts and data inside, which makes no request of any kind.

All data, text included, travels as one compressed binary block in base64. The scripts write text with text nodes only,
so no name from a data set can become markup. The content security policy allows the scripts and styles of this package
by their hashes and nothing else.
"""

import base64
import hashlib
import html
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vit_scaling import paths

_COMMON = ("core.js", "plot.js", "chart.js", "maps.js")
_DTYPES = {"uint8", "int8", "uint16", "int16", "int32", "float32"}


def page(title: str, scripts: Sequence[str], data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the HTML text of a page.

    Args:
        title: of the browser's window.
        scripts: files of web/ beside the common ones; the last one starts the page.
        data: anything that JSON holds; NaN and infinity become null.
        arrays: what the scripts read as typed arrays, by name.
    """
    style = _hashable((resources.files(__package__) / "web" / "page.css").read_text())
    code = "\n".join((resources.files(__package__) / "web" / name).read_text() for name in (*_COMMON, *scripts))
    code = _hashable(f'"use strict";\n(() => {{\n{code}\n}})();\n')
    policy = f"default-src 'none'; img-src data:; script-src '{_hash(code)}'; style-src '{_hash(style)}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title[:200])}</title>\n"
        # An empty icon, or the browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n<noscript>This page draws its data with JavaScript.</noscript>\n"
        f'<script id="data" type="application/octet-stream">{pack(data, arrays)}</script>\n'
        f"<script>{code}</script>\n</body>\n</html>\n"
    )


def write(path: Path, text: str) -> None:
    """Writes a page, whole or not at all."""
    paths.make_folder(path.parent)
    paths.write(path, text)


def pack(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns base64 of the compressed (length of the JSON, JSON, arrays), each part at a multiple of 4 bytes."""
    index, parts, offset = {}, [], 0
    for name, array in arrays.items():
        assert array.dtype.name in _DTYPES, f"{name} is {array.dtype}"
        raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        index[name] = {"offset": offset, "dtype": array.dtype.name, "shape": list(array.shape)}
        parts.append(raw + bytes(-len(raw) % 4))
        offset += len(parts[-1])
    text = json.dumps({"data": finite(data), "arrays": index}, allow_nan=False, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 4)
    compressed = zlib.compress(len(text).to_bytes(4, "little") + text + b"".join(parts), 6)
    return base64.b64encode(compressed).decode()


def unpack(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the data and the arrays of a packed block or of a whole page, as its scripts see them."""
    if "<script" in text:
        text = text.split('type="application/octet-stream">')[1].split("</script>")[0]
    raw = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(raw[:4], "little")
    both = json.loads(raw[4 : 4 + length])
    arrays = {
        name: np.frombuffer(raw, entry["dtype"], math.prod(entry["shape"]), 4 + length + entry["offset"]).reshape(
            entry["shape"]
        )
        for name, entry in both["arrays"].items()
    }
    return both["data"], arrays


def picture(image: np.ndarray) -> str:
    """Returns a uint8 image [H, W, 3] or [H, W] as the data URL of a PNG, pixel by pixel the same."""
    encoded = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1]
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()


def finite(value: Any) -> Any:
    """Returns JSON in which NaN and infinity are null, tuples are lists, and NumPy's numbers are Python's."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hashable(text: str) -> str:
    """Returns text as the browser hashes it, and makes sure that it ends where its element ends."""
    assert "</script" not in text.lower()
    assert "</style" not in text.lower()
    return text.replace("\r\n", "\n")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
