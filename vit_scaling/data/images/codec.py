"""From the bytes of an image file to uint8 RGB, with a rule for everything that occurs in large sets.

The content decides the format; the file's name plays no part.

| input                                   | rule                                                                       |
|-----------------------------------------|----------------------------------------------------------------------------|
| JPEG, PNG, WebP                         | decoded by libjpeg-turbo and OpenCV                                        |
| BMP, GIF, TIFF, AVIF, JPEG 2000, PNM,   | decoded by Pillow, which is slower: the first frame of a GIF or WebP, the  |
| ICO, PSD; PNG, WebP that are animated   | default image of an animated PNG, the first page of a TIFF, the largest    |
| or transparent                          | image of an ICO, the merged image of a PSD                                 |
| other formats, an empty file, text      | `CorruptImageError`, which names the format where it is known              |
| cut off, or refused by the decoder      | `CorruptImageError`                                                        |
| JPEG that decodes with a warning, or    | used, with a note; `CorruptImageError` where over 5% of the rows are lost  |
| lacks nothing but its end marker        |                                                                            |
| bytes after the end of the image        | ignored                                                                    |
| more than `MAX_PIXELS` by its header    | `CorruptImageError`, before memory for pixels is taken                     |
| grey, palette, CMYK, YCCK               | converted to RGB as Pillow does; colour profiles are ignored               |
| alpha                                   | composited on white, black, or dropped (`alpha`), with a note              |
| 16 bits per channel                     | the upper 8 bits                                                           |
| 32-bit integers, floating point         | `CorruptImageError`: no range is known                                     |
| EXIF orientation (JPEG, PNG, WebP, ...) | applied: the image comes out upright                                       |
| 1 x 1                                   | an image like any other                                                    |

A note says what `decode` did to an image beyond decoding it; `take_notes` returns the notes of the calling thread.
"""

import threading
from collections import deque
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from vit_scaling.data.images import turbojpeg
from vit_scaling.data.images.header import (
    MAX_PIXELS,
    CorruptImageError,
    Header,
    format_of,
    jpeg_segments,
    open_with_pillow,
    pillow_failed,
    read_header,
    readable,
)

__all__ = ["MAX_PIXELS", "CorruptImageError", "Header", "decode", "format_of", "read_header", "readable", "take_notes"]

Box = tuple[int, int, int, int]  # top, left, height, width

MAX_MISSING = 0.05  # of the rows of a JPEG whose data end early
ALPHA = {"white": 255, "black": 0, "drop": None}
BAND = 256  # rows that are converted at a time, which bounds memory


class Note(NamedTuple):
    """What was done to an image beyond decoding it: kind is "alpha" or "warning"."""

    kind: str
    text: str


_own = threading.local()


def take_notes() -> list[Note]:
    """Returns the notes (the last 100) of the calling thread's `decode` calls since the last call, and forgets them."""
    return list(vars(_own).pop("notes", ()))


def _note(kind: str, text: str) -> None:
    vars(_own).setdefault("notes", deque(maxlen=100)).append(Note(kind, text))


def decode(
    data: bytes,
    header: Header | None = None,
    *,
    reduce: int = 1,
    crop: Box | None = None,
    alpha: str = "white",
    exact: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image, or a box of it, to uint8 RGB, upright.

    JPEG goes through libjpeg-turbo's fast inverse DCT and plain chroma upsampling (a few grey levels from the slow way,
    where colours have edges), unless `exact`.

    Args:
        data: the encoded file.
        header: `read_header(data)`, where the caller has it.
        reduce: 1, 2, 4 or 8: a JPEG is decoded at 1/reduce of its size (rounded down, but at least 1), which scales
            inside the inverse DCT and saves most of the work. Other formats ignore it.
        crop: top, left, height, width of what is wanted, in pixels of the reduced image; the part of it that lies
            inside the image is returned, equal to the same box of the whole. Of an upright JPEG in one scan little
            else is decoded, and damage below the box goes unnoticed.
        alpha: what is behind transparent pixels, "white" or "black"; "drop" keeps the colours that alpha hides.
        exact: whether a JPEG has the pixels that Pillow decodes.

    Raises:
        CorruptImageError: see the table above.
    """
    header = header or read_header(data)
    if header.format == "jpeg":
        height, width = (header.width, header.height) if header.orientation > 4 else (header.height, header.width)
        # The last row and column of blocks may stand for fewer pixels than the others; those do not count.
        height, width = max(height // reduce, 1), max(width // reduce, 1)
        if crop is not None and not exact and header.regions and (library := turbojpeg.load()) is not None:
            top, left = crop[:2]
            bottom, right = min(top + crop[2], height), min(left + crop[3], width)
            return _decode_region(library, data, header, reduce, top, left, bottom, right)
        image = _decode_jpeg(data, header, reduce, exact)[:height, :width]
    elif header.pillow:
        image = _decode_pillow(data, header, alpha)
    else:
        image = _decode_opencv(data, header.format)
    image = upright(image, header.orientation)
    return image if crop is None else image[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns an image as its EXIF orientation (1 to 8) asks: row and column of the stored image to top and left."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


# ---- decoders --------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, header: Header, reduce: int, exact: bool) -> np.ndarray:
    height, width = (header.width, header.height) if header.orientation > 4 else (header.height, header.width)
    options = {
        "colorspace": "CMYK" if header.components == 4 else "RGB",
        "fastdct": not exact,
        "fastupsample": not exact,
        "min_height": -(-height // reduce),
        "min_width": -(-width // reduce),
        "min_factor": reduce,
    }
    try:
        image = simplejpeg.decode_jpeg(data if header.ended else data + b"\xff\xd9", **options)
        if not header.ended:
            _note("warning", "the JPEG file has no end-of-image marker")
    except ValueError as warning:
        if not header.ended:
            raise CorruptImageError(f"the JPEG file is cut off: {warning}") from None
        try:
            image = simplejpeg.decode_jpeg(_mended(data), **options, strict=False)
        except ValueError as error:
            raise CorruptImageError(f"the JPEG decoder says: {error}") from None
        _accept(image, str(warning))
    return _rgb_of_cmyk(image) if header.components == 4 else image


def _decode_region(
    library: turbojpeg.TurboJPEG, data: bytes, header: Header, reduce: int, top: int, left: int, bottom: int, right: int
) -> np.ndarray:
    block = max(header.block_columns // reduce, 1)
    start = left // block * block
    try:
        image, warning = library.decode(data, reduce, top, start, bottom - top, right - start)
    except ValueError as error:
        raise CorruptImageError(f"the JPEG decoder says: {error}") from None
    if warning:
        _accept(image, warning)
    return image[:, left - start :]


def _mended(data: bytes) -> bytes:
    """Returns a JPEG without its colour profile and the junk in its header, which simplejpeg refuses."""
    parts, scan = [b"\xff\xd8"], 0
    for marker, position, length in jpeg_segments(data):
        if marker != 0xE2:
            parts.append(data[position : position + length])
        scan = position + length
    return b"".join([*parts, data[scan:]])


def _accept(image: np.ndarray, warning: str) -> None:
    """Notes a decoder's warning, or refuses the image: libjpeg fills what is missing at the end with value 128."""
    filled = (image == 128).all(axis=(1, 2))[::-1]
    missing = (len(filled) if filled.all() else int(np.argmin(filled))) / len(filled)
    if missing > MAX_MISSING:
        raise CorruptImageError(f"the JPEG decoder says: {warning}; the last {missing:.0%} of the rows are missing")
    _note("warning", f"the JPEG decoder warns: {warning}")


def _rgb_of_cmyk(image: np.ndarray) -> np.ndarray:
    """Converts CMYK as JPEG files store it, inverted (Adobe's way), by Pillow's formula."""
    rgb = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), BAND):
        band = image[top : top + BAND].astype(np.uint32)
        black = band[..., 3:]
        rgb[top : top + BAND] = black - _divide_255((255 - band[..., :3]) * black)
    return rgb


def _divide_255(product: np.ndarray) -> np.ndarray:
    """Returns product / 255, rounded to the nearest, in integers."""
    product = product + 128
    return (product + (product >> 8)) >> 8


def _decode_opencv(data: bytes, format: str) -> np.ndarray:
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise CorruptImageError(f"the {format} decoder says: {error.err}") from None
    if decoded is None:
        raise CorruptImageError(f"the {format} decoder refuses it")
    return decoded


def _decode_pillow(data: bytes, header: Header, alpha: str) -> np.ndarray:
    """Decodes the first frame. The image stays as stored: `decode` turns it."""
    try:
        with open_with_pillow(data, header.format) as image:
            image.load()
            rgb = np.empty((image.height, image.width, 3), np.uint8)
            seen_through = False
            for top in range(0, image.height, BAND):
                band = image.crop((0, top, image.width, min(top + BAND, image.height)))
                colours, opacity = _colours(band, header.format)
                if opacity is not None and (opacity < 255).any():
                    seen_through = True
                    if (background := ALPHA[alpha]) is not None:
                        wide = opacity[..., None].astype(np.uint32)
                        colours = _divide_255(colours * wide + background * (255 - wide))
                rgb[top : top + BAND] = colours
    except CorruptImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever the bytes lead them to
        raise pillow_failed(header.format, error) from None
    if seen_through:
        _note("alpha", "alpha is dropped" if alpha == "drop" else f"alpha is composited on {alpha}")
    return rgb


def _colours(band: Image.Image, format: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns RGB uint8 [H, W, 3] and opacity uint8 [H, W], or None where the mode has none."""
    transparent = band.info.get("transparency")
    if band.mode.startswith("I;16") or (band.mode == "I" and format in ("png", "pnm")):
        values = np.asarray(band)
        opacity = np.where(values == transparent, 0, 255) if isinstance(transparent, int) else None
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2), opacity
    if band.mode in ("I", "F"):
        raise CorruptImageError(f"its pixels are 32-bit {'integers' if band.mode == 'I' else 'floating point'}")
    if transparent is not None or band.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = np.asarray(band.convert("RGBA"))
        return rgba[..., :3], rgba[..., 3]
    return np.asarray(band.convert("RGB")), None
