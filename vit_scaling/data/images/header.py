"""What the first bytes of an image file say: format, size, orientation, and which decoder reads it."""

import io
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from vit_scaling import UserError

MAX_PIXELS = 89_478_485
"""Larger images are refused: Pillow's limit. Decoding one of this size takes less than 1 GiB."""

# The bytes that a format begins with, from an offset on.
_MAGIC = (
    ("jpeg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG\r\n\x1a\n"),
    ("webp", 8, b"WEBP"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    *(("tiff", 0, magic) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *(("jpeg2000", 0, magic) for magic in (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")),
    *(("pnm", 0, b"P%d%s" % (kind, space)) for kind in range(1, 7) for space in (b"\n", b" ", b"\t", b"\r")),
    *(("jpegxl", 0, magic) for magic in (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")),
    ("psd", 0, b"8BPS"),
    ("ico", 0, b"\0\0\1\0"),
    *(("svg", 0, magic) for magic in (b"<svg", b"<?xml")),
)
_HEIF = {b"avif": "avif", b"avis": "avif"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"mif1"), "heic")

_PILLOW = {
    "png": "PNG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tiff": "TIFF",
    "avif": "AVIF",
    "jpeg2000": "JPEG2000",
    "pnm": "PPM",
    "ico": "ICO",
    "psd": "PSD",
}


class CorruptImageError(UserError):
    """This image cannot be used, however often it is read."""


class Header(NamedTuple):
    """What the first bytes of a file say. Height and width are those of the upright image."""

    format: str
    height: int
    width: int
    orientation: int = 1  # EXIF's, 1 to 8
    components: int = 3  # of a JPEG: 1 is grey, 3 colour, 4 CMYK or YCCK
    ended: bool = True  # of a JPEG: has an end-of-image marker after its first scan
    regions: bool = False  # of a JPEG: upright, complete and in one scan, so that a box of it can be decoded alone
    block_columns: int = 0  # of a JPEG: columns in one of its blocks
    pillow: bool = False  # decoded by Pillow


def format_of(first: bytes) -> str | None:
    """Returns the image format that a file's first 32 bytes show, whether it can be read here or not; None if none."""
    for name, offset, magic in _MAGIC:
        if first[offset : offset + len(magic)] == magic:
            return None if name == "webp" and first[:4] != b"RIFF" else name
    if first[4:8] == b"ftyp":
        brands = [first[at : at + 4] for at in (8, *range(16, len(first) - 3, 4))]
        found = [_HEIF[brand] for brand in brands if brand in _HEIF]
        return "avif" if "avif" in found else found[0] if found else None
    return None


def readable(format: str) -> bool:
    """Returns whether images of a format, as `format_of` names it, can be decoded here."""
    if format == "jpeg":
        return True
    Image.init()
    return _PILLOW.get(format) in Image.OPEN


def read_header(data: bytes) -> Header:
    """Returns format, size and orientation of an encoded image without decoding it.

    Raises:
        CorruptImageError: no format that is read, cut off, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise CorruptImageError("the file is empty")
    format = format_of(data[:32])
    if format is None:
        raise CorruptImageError(f"it begins with {data[:8]!r}, which is no known image format")
    if not readable(format):
        raise CorruptImageError(f"it is a {format.upper()} file, a format that is not read; convert it to PNG or JPEG")
    try:
        own = {"jpeg": _jpeg_header, "png": _png_header, "webp": _webp_header}.get(format)
        header = _pillow_header(data, format) if own is None else own(data)
    except (struct.error, IndexError):
        raise CorruptImageError("it ends inside its header") from None
    if header.height < 1 or header.width < 1:
        raise CorruptImageError(f"its header gives {header.height} x {header.width} pixels")
    if header.height * header.width > MAX_PIXELS:
        raise CorruptImageError(
            f"its {header.height} x {header.width} pixels are more than the {MAX_PIXELS} that are allowed"
        )
    if header.orientation > 4:
        header = header._replace(height=header.width, width=header.height)
    return header


def open_with_pillow(data: bytes, format: str) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=[_PILLOW[format]])


def pillow_failed(format: str, error: Exception) -> CorruptImageError:
    """Returns the error of an image that Pillow cannot read, without the address of the buffer in Pillow's text."""
    return CorruptImageError(f"the {format} decoder says: {re.sub(r' <_io[^>]*>', '', str(error))}")


# Below: height and width as stored.


def _pillow_header(data: bytes, format: str) -> Header:
    try:
        with open_with_pillow(data, format) as image:
            size = image.size
            orientation = 1 if format == "tiff" else image.getexif().get(0x0112, 1)  # Pillow turns a TIFF itself
    except Exception as error:  # Pillow's plugins raise whatever the bytes lead them to
        raise pillow_failed(format, error) from None
    return Header(format, size[1], size[0], orientation if orientation in range(1, 9) else 1, pillow=True)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, position, bytes) of the segments of a JPEG up to its first scan, which is the last."""
    position = 2
    while True:
        # As libjpeg does: bytes that are no marker are skipped (its decoder warns), and so is fill before a marker.
        while data[position] != 0xFF or data[position + 1] in (0x00, 0xFF):
            position += 1
        marker = data[position + 1]
        length = 0 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else struct.unpack_from(">H", data, position + 2)[0]
        yield marker, position, 2 + length
        if marker == 0xDA:
            return
        position += 2 + length


def _jpeg_header(data: bytes) -> Header:
    orientation, frame, sequential = 1, 0, False
    for marker, position, length in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, sequential = position + 5, marker in (0xC0, 0xC1)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0" and orientation == 1:
            orientation = _exif_orientation(data[position + 10 : position + length])
    if not frame:
        raise CorruptImageError("the JPEG file has no frame header before its first scan")
    height, width, components = struct.unpack_from(">HHB", data, frame)
    sampling = [data[frame + 6 + 3 * component] for component in range(components)] if components > 1 else [0x11]
    one_scan = sequential and data[position + 4] == components
    ended = data.rfind(b"\xff\xd9") > position
    regions = one_scan and ended and orientation == 1 and components != 4
    return Header("jpeg", height, width, orientation, components, ended, regions, 8 * (max(sampling) >> 4))


def _exif_orientation(tiff: bytes) -> int:
    """Returns tag 0x0112 of the first directory of an EXIF block; 1 where it is absent or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order:
            (directory,) = struct.unpack_from(order + "I", tiff, 4)
            (entries,) = struct.unpack_from(order + "H", tiff, directory)
            for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
                tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
                if tag == 0x0112 and 1 <= value <= 8:
                    return value
    except struct.error:
        pass  # a broken EXIF block is no reason to lose the image
    return 1


def _png_header(data: bytes) -> Header:
    """Walks all chunks: a chunk that is longer than the file is refused before any decoder allocates for it."""
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    pillow, orientation, position, kind = colour in (4, 6), 1, 8, b""
    while kind != b"IEND":
        if position + 8 > len(data):
            raise CorruptImageError("the png file is cut off: it has no IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind != b"IEND" and position + 12 + length > len(data):
            raise CorruptImageError(
                f"the png file is cut off: its chunk {kind!r} of {length} bytes at byte {position} runs past the end"
            )
        pillow |= kind in (b"tRNS", b"acTL")
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        position += 12 + length
    return Header("png", height, width, orientation, pillow=pillow)


def _webp_header(data: bytes) -> Header:
    """Size from the first chunk: VP8 (lossy), VP8L (lossless) or VP8X (extended)."""
    if len(data) < struct.unpack_from("<I", data, 4)[0]:
        raise CorruptImageError("the webp file is cut off")
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, pillow=bool(bits >> 28 & 1))
    if kind != b"VP8X":
        raise CorruptImageError(f"its first WebP chunk is {kind!r}")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    orientation, position = 1, 30
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            body = data[position + 8 : position + 8 + length]
            orientation = _exif_orientation(body.removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    return Header("webp", height, width, orientation, pillow=bool(data[20] & 0x12))  # animation 0x02, alpha 0x10
