"""From the bytes of an image file to uint8 RGB, with a rule for everything that turns up in a large set.

| input                                   | rule                                                             |
|-----------------------------------------|------------------------------------------------------------------|
| JPEG, PNG, WebP, BMP, by their content  | decoded; the file's name plays no part                           |
| anything else, an empty file, text      | `CorruptImageError`                                                   |
| cut off, or refused by the decoder      | `CorruptImageError`; half an image is never returned                  |
| more than `MAX_PIXELS` by its header    | `CorruptImageError`, before memory for pixels is taken                |
| grey, palette, CMYK                     | converted to RGB                                                 |
| alpha                                   | dropped: the colours below it stay                               |
| 16 bits a channel                       | the upper 8 bits                                                 |
| JPEG with an EXIF orientation           | turned upright                                                   |
| 1 x 1                                   | an image like any other                                          |
"""

import re
import struct
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from vit_scaling import UserError
from vit_scaling.data.images import turbojpeg

Box = tuple[int, int, int, int]  # top, left, height, width

MAX_PIXELS = 100_000_000
"""Larger images are refused. Decoding one of this size takes 300 MB."""


class CorruptImageError(UserError):
    """This image cannot be used, whoever reads it and however often."""


class Header(NamedTuple):
    """What the first bytes of a file say. Height and width are those of the upright image."""

    format: str
    height: int
    width: int
    orientation: int = 1  # EXIF's, 1 to 8
    components: int = 3  # of a JPEG: 1 is grey, 3 colour, 4 CMYK
    frame: int = 0  # where a JPEG whose rows are stored from top to bottom, in one scan, says its height; else 0
    block_rows: int = 0  # rows in a row of its blocks
    block_columns: int = 0  # columns in one of its blocks


def read_header(data: bytes) -> Header:
    """Returns format, size and orientation of an encoded image without decoding it.

    Raises:
        CorruptImageError: no known format, cut off, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise CorruptImageError("the file is empty")
    try:
        if data[:2] == b"\xff\xd8":
            header = _jpeg_header(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack_from(">II", data, 16)
            header = Header("png", height, width)
            complete = b"IEND" in data[-16:]
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _webp_header(data)
            complete = len(data) >= struct.unpack_from("<I", data, 4)[0]
        elif data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            header = Header("bmp", abs(height), abs(width))
            complete = len(data) >= struct.unpack_from("<I", data, 2)[0]
        else:
            raise CorruptImageError(f"it begins with {data[:8]!r} and is no JPEG, PNG, WebP or BMP image")
    except (struct.error, IndexError):
        raise CorruptImageError("it ends inside its header") from None
    if header.height < 1 or header.width < 1:
        raise CorruptImageError(f"its header gives {header.height} x {header.width} pixels")
    if header.height * header.width > MAX_PIXELS:
        raise CorruptImageError(
            f"its {header.height} x {header.width} pixels are more than the {MAX_PIXELS} that are allowed"
        )
    if header.format != "jpeg" and not complete:
        raise CorruptImageError(f"the {header.format} file is cut off")
    return header


def decode(
    data: bytes, header: Header | None = None, *, reduce: int = 1, crop: Box | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image, or a box of it, to uint8 RGB, upright.

    JPEG goes through libjpeg-turbo's fast inverse DCT and plain chroma upsampling (a few grey levels from the slow way,
    where colours have edges); everything else through OpenCV.

    Args:
        data: the encoded file.
        header: `read_header(data)`, if it is at hand.
        reduce: 1, 2, 4 or 8: a JPEG is decoded at 1/reduce of its size (rounded down, but at least 1), which scales
            inside the inverse DCT and saves most of the work. Other formats ignore it.
        crop: top, left, height, width of what is wanted, in pixels of the reduced image; the part of it that lies
            inside the image comes back, equal to the same box of the whole. Of an upright JPEG in one scan little
            else is decoded, and what lies below the box is not looked at.

    Raises:
        CorruptImageError: see the table above.
    """
    header = header or read_header(data)
    if header.format == "jpeg" and header.components != 4:
        height, width = (header.width, header.height) if header.orientation > 4 else (header.height, header.width)
        # The last row and column of blocks may stand for fewer pixels than the others; those do not count.
        height, width = max(height // reduce, 1), max(width // reduce, 1)
        try:
            if crop is not None and header.frame:
                top, left = crop[:2]
                return _decode_box(
                    data, header, reduce, top, left, min(top + crop[2], height), min(left + crop[3], width)
                )
            image = upright(_decode_jpeg(data, header, reduce)[:height, :width], header.orientation)
        except ValueError as error:
            raise CorruptImageError(f"the JPEG decoder says: {error}") from None
    else:
        image = upright(_decode_other(data, header.format), header.orientation)
    return image if crop is None else image[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]


def _decode_other(data: bytes, format: str) -> np.ndarray:
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise CorruptImageError(f"the {format} decoder says: {error.err}") from None
    if decoded is None:
        raise CorruptImageError(f"the {format} decoder refuses it")
    return decoded


def _decode_jpeg(data: bytes, header: Header, reduce: int, buffer: np.ndarray | None = None) -> np.ndarray:
    height, width = (header.width, header.height) if header.orientation > 4 else (header.height, header.width)
    return simplejpeg.decode_jpeg(
        data,
        fastdct=True,
        fastupsample=True,
        min_height=-(-height // reduce),
        min_width=-(-width // reduce),
        min_factor=reduce,
        buffer=buffer,
    )


def _decode_box(data: bytes, header: Header, reduce: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """Decodes a box of a JPEG that is stored upright and in one scan."""
    if (library := turbojpeg.load()) is None:
        return _decode_top(data, header, bottom, reduce)[top:, left:right]
    block = max(header.block_columns // reduce, 1)
    start = left // block * block
    return library.decode(data, reduce, top, start, bottom - top, right - start)[:, left - start :]


def _decode_top(data: bytes, header: Header, bottom: int, reduce: int) -> np.ndarray:
    """Decodes the rows above `bottom`, by telling the decoder that the image ends with their row of blocks.

    At the end it then complains, once and about nothing else, that bytes are left before the next marker. By that time
    the pixels are in the buffer. Any other complaint is of the data.
    """
    rows = -(-bottom * reduce // header.block_rows) * header.block_rows
    if rows >= header.height:
        return _decode_jpeg(data, header, reduce)[:bottom]
    shortened = b"".join((data[: header.frame], rows.to_bytes(2, "big"), data[header.frame + 2 :]))
    pixels = np.empty((rows // reduce, -(-header.width // reduce), 3), np.uint8)
    try:
        _decode_jpeg(shortened, header._replace(height=rows), reduce, pixels)
    except ValueError as error:
        if not re.fullmatch(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd\d", str(error)):
            raise
    return pixels[:bottom]


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns an image as its EXIF orientation (1 to 8) asks: row and column of the stored image to top and left."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _jpeg_header(data: bytes) -> Header:
    """Walks the segments up to the first scan; the image data must then run to an end-of-image marker."""
    orientation, frame, sequential, position = 1, 0, False, 2
    while True:
        while data[position] == 0xFF and data[position + 1] == 0xFF:  # fill bytes before a marker
            position += 1
        if data[position] != 0xFF:
            raise CorruptImageError(f"byte {position} of the JPEG file is no marker")
        marker = data[position + 1]
        if marker == 0xDA:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a body
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, sequential = position + 5, marker in (0xC0, 0xC1)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    if not frame:
        raise CorruptImageError("the JPEG file has no frame header before its first scan")
    if data.rfind(b"\xff\xd9") < position:
        raise CorruptImageError("the JPEG file is cut off: it has no end-of-image marker")
    height, width, components = struct.unpack_from(">HHB", data, frame)
    sampling = [data[frame + 6 + 3 * component] for component in range(components)] if components > 1 else [0x11]
    block_columns, block_rows = 8 * (max(sampling) >> 4), 8 * max([factor & 15 for factor in sampling])
    one_scan = data[position + 4] == components
    if orientation > 4:
        height, width = width, height
    if orientation != 1 or not sequential or not one_scan:
        frame = 0
    return Header("jpeg", height, width, orientation, components, frame, block_rows, block_columns)


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


def _webp_header(data: bytes) -> Header:
    """Size from the first chunk: VP8 (lossy), VP8L (lossless) or VP8X (extended)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return Header("webp", height, width)
    raise CorruptImageError(f"its first WebP chunk is {kind!r}")
