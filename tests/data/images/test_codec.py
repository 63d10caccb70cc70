"""Decoding: every kind of file against Pillow or its definition, and what is refused.

`python -m benchmarks.decoders` does the same with real files.
"""

import io
import platform
import struct
import sys
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.images.common import distance, encode
from vit_scaling.data.images import codec, transforms, turbojpeg
from vit_scaling.data.images.transforms import TransformConfig, transform


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def no_notes():
    codec.take_notes()


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subsampling", "largest", "mean"), [(0, 8, 1.5), (1, 40, 2.0), (2, 60, 2.5)])
def test_jpeg_agrees_with_pillow(photograph, subsampling, largest, mean):
    data = encode(photograph, quality=90, subsampling=subsampling)
    worst, average = distance(codec.decode(data), Image.open(io.BytesIO(data)))
    assert worst <= largest
    assert average <= mean


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_jpeg_agrees_with_pillow_draft(photograph, reduce):
    data = encode(photograph, quality=90, subsampling=0)
    reference = Image.open(io.BytesIO(data))
    reference.draft("RGB", (403 // reduce, 301 // reduce))
    whole = np.asarray(reference)[: 301 // reduce, : 403 // reduce]
    assert distance(codec.decode(data, reduce=reduce), whole) <= (8, 1.5)


@pytest.fixture(params=["turbojpeg", "simplejpeg"])
def library(request, monkeypatch) -> str:
    """With a library that decodes regions, and without."""
    if request.param == "simplejpeg":
        monkeypatch.setattr(turbojpeg, "load", lambda: None)
    elif turbojpeg.load() is None:
        assert (sys.platform, platform.machine()) != ("linux", "x86_64"), "pylibjxl no longer exports TurboJPEG's API"
        pytest.fail("install libjpeg-turbo 3: this platform has no wheel of pylibjxl")
    return request.param


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_rows": 2}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_box_of_a_jpeg_equals_the_box_of_all_of_it(photograph, options, mode, library):
    data = encode(Image.fromarray(photograph).convert(mode), quality=90, **options)
    for reduce in (1, 2, 8):
        full = codec.decode(data, reduce=reduce)
        assert full.shape == (301 // reduce, 403 // reduce, 3)
        height, width = full.shape[:2]
        boxes = [(0, 0, 1, 1), (1, 17, 16, 30), (0, 0, 400, 500), (height - 3, width - 5, 3, 5), (9, 0, 20, width)]
        for top, left, h, w in boxes:
            box = codec.decode(data, reduce=reduce, crop=(top, left, h, w))
            np.testing.assert_array_equal(box, full[top : top + h, left : left + w])


def test_damage_below_a_box_does_not_change_it(photograph, library):
    data = encode(photograph, quality=90)
    spoilt = data[: int(0.8 * len(data))] + bytes(len(data) - int(0.8 * len(data)) - 2) + data[-2:]
    box = codec.decode(spoilt, crop=(30, 40, 100, 150))
    np.testing.assert_array_equal(box, codec.decode(data)[30:130, 40:190])


def test_a_cut_jpeg_is_refused_even_for_a_box_above_the_cut(photograph, library):
    data = encode(photograph, quality=90)
    with pytest.raises(codec.CorruptImageError, match="the JPEG file is cut off: "):
        codec.decode(data[:-50], crop=(30, 40, 100, 150))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_every_png_without_alpha_becomes_rgb_as_pillow_converts_it(photograph, mode):
    image = Image.fromarray(photograph).convert(mode)
    np.testing.assert_array_equal(codec.decode(encode(image, "png")), np.asarray(image.convert("RGB")))
    assert codec.take_notes() == []


@pytest.fixture(scope="module")
def glass(photograph) -> Image.Image:
    """A small image whose opacity takes every value."""
    image = Image.fromarray(photograph[:64, :80])
    image.putalpha(Image.fromarray(np.arange(64 * 80, dtype=np.uint32).reshape(64, 80).astype(np.uint8)))
    return image


def translucent(glass: Image.Image, kind: str) -> bytes:
    if kind == "palette":
        return encode(glass.convert("RGB").quantize(16), "png", transparency=3)
    if kind == "palette, a table":
        return encode(glass.convert("RGB").quantize(16), "png", transparency=bytes(range(0, 256, 16)))
    if kind == "grey key":
        return encode(glass.convert("L"), "png", transparency=glass.convert("L").getpixel((5, 5)))
    if kind == "colour key":
        return encode(glass.convert("RGB"), "png", transparency=glass.getpixel((5, 5))[:3])
    if kind == "grey":
        return encode(glass.convert("LA"), "png")
    if kind == "gif":
        return encode(glass.convert("RGB").quantize(16), "gif", transparency=3)
    if kind == "lossy webp":
        return encode(glass, "webp", quality=90)
    return encode(glass, kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))


@pytest.mark.parametrize(
    "kind",
    ["png", "webp", "lossy webp", "tiff", "grey", "palette", "palette, a table", "grey key", "colour key", "gif"],
)
def test_alpha_is_composited_and_noted(glass, kind):
    data = translucent(glass, kind)
    reference = Image.open(io.BytesIO(data)).convert("RGBA")
    codec.take_notes()
    for alpha in ("white", "black"):
        behind = Image.new("RGB", reference.size, alpha)
        behind.paste(reference, mask=reference.getchannel("A"))
        np.testing.assert_array_equal(codec.decode(data, alpha=alpha), np.asarray(behind))
    np.testing.assert_array_equal(codec.decode(data, alpha="drop"), np.asarray(reference)[..., :3])
    assert [tuple(note) for note in codec.take_notes()] == [
        ("alpha", "alpha is composited on white"),
        ("alpha", "alpha is composited on black"),
        ("alpha", "alpha is dropped"),
    ]
    crop = transform(TransformConfig((64, 80), crop="none", alpha="black"), train=False)
    np.testing.assert_array_equal(crop({"image": data, "label": 0}, None)["image"], codec.decode(data, alpha="black"))


def test_alpha_that_hides_nothing_is_not_noted(photograph):
    image = Image.fromarray(photograph)
    image.putalpha(255)
    np.testing.assert_array_equal(codec.decode(encode(image, "png")), photograph)
    assert codec.take_notes() == []


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def ihdr(height: int, width: int, depth: int, colour: int, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_sixteen_bit_png_keeps_the_upper_eight_bits(colour):
    """Written by hand: grey, RGB, and both with alpha; 1.5 of 255 is transparent, and the key of grey is one value."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    deep = rng().integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks = [ihdr(5, 7, 16, colour), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    upper = (deep >> 8).astype(np.uint8)
    colours = np.broadcast_to(upper[..., : channels - (colour > 2)], (5, 7, 3))
    np.testing.assert_array_equal(codec.decode(png(chunks), alpha="drop"), colours)
    if colour == 0:
        chunks.insert(1, (b"tRNS", deep[2, 3].astype(">u2").tobytes()))
        assert codec.decode(png(chunks))[2, 3].tolist() == [255, 255, 255]
        assert codec.decode(png(chunks), alpha="black")[2, 4].tolist() == colours[2, 4].tolist()


def test_an_interlaced_png_is_read():
    """Adam7 of 1 x 2 pixels: passes 1 and 6 hold one pixel each."""
    rows = b"\0" + b"\x0a\x14\x1e" + b"\0" + b"\x28\x32\x3c"
    data = png([ihdr(1, 2, 8, 2, interlaced=1), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])
    assert codec.decode(data).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_an_animated_png_gives_its_default_image():
    red, green, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue"))
    data = encode(red, "png", save_all=True, append_images=[green, blue], default_image=True)
    assert codec.decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_of_several_frames_the_first_is_read(kind):
    red, green = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "lime")
    options = {"lossless": True} if kind == "webp" else {}
    assert codec.decode(encode(red, kind, save_all=True, append_images=[green], **options))[0, 0].tolist() == [
        255,
        0,
        0,
    ]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_bytes_after_the_end_are_ignored(photograph, kind):
    data = encode(photograph[:40, :50], kind)
    np.testing.assert_array_equal(codec.decode(data + b"after the end" * 9), codec.decode(data))
    assert codec.take_notes() == []


def test_a_chunk_longer_than_the_file_is_refused_without_allocating():
    data = png([ihdr(1, 1, 8, 2)]) + struct.pack(">I", 0x7FFFFFF0) + b"IDAT" + bytes(15)
    assert len(data) < 65
    tracemalloc.start()
    with pytest.raises(
        codec.CorruptImageError, match=r"chunk b'IDAT' of 2147483632 bytes at byte 33 runs past the end"
    ):
        codec.decode(data)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_os2_and_sixteen_bit_bmp_are_read():
    """An OS/2 header has 16-bit sides; 5 bits per channel are stretched to 8."""
    pixels = b"\x1e\x14\x0a\x3c\x32\x28" + bytes(2)
    os2 = b"BM" + struct.pack("<IHHI", 26 + len(pixels), 0, 0, 26) + struct.pack("<IHHHH", 12, 2, 1, 1, 24) + pixels
    assert codec.decode(os2).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    body = struct.pack("<HH", 31 << 10, 31)
    info = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0, len(body), 0, 0, 0, 0)
    assert codec.decode(b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + info + body).tolist() == [
        [[255, 0, 0], [0, 0, 255]]
    ]


def test_formats_are_recognised_by_content(photograph):
    small = photograph[:20, :30]
    for kind in ("jpeg", "png", "webp", "bmp", "gif", "tiff", "avif", "jpeg2000", "ico", "ppm"):
        data = encode(small, kind)
        name = {"ppm": "pnm"}.get(kind, kind)
        assert codec.format_of(data[:32]) == name
        assert codec.readable(name)
        assert distance(codec.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))[1] < 2.5
    heic = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    assert codec.format_of(heic) == "heic"
    assert codec.format_of(heic.replace(b"heic", b"avif")) == "avif"
    assert codec.format_of(b"\xff\x0a" + bytes(30)) == "jpegxl"
    assert [codec.format_of(data) for data in (b"", b"RIFF1234WAVE", b"%PDF-1.7", b"GIF", bytes(32))] == [None] * 5
    with pytest.raises(codec.CorruptImageError, match="it is a HEIC file, a format that is not read; convert it"):
        codec.read_header(heic)


@pytest.mark.parametrize("array", [np.zeros((3, 4), np.float32), np.zeros((3, 4), np.int32)])
def test_pixels_without_a_known_range_are_refused(array):
    with pytest.raises(codec.CorruptImageError, match="its pixels are 32-bit"):
        codec.decode(encode(Image.fromarray(array), "tiff"))


@pytest.mark.parametrize(("kind", "options"), [("webp", {"lossless": True}), ("webp", {"quality": 80}), ("bmp", {})])
def test_webp_and_bmp_agree_with_pillow(photograph, kind, options):
    data = encode(photograph, kind, **options)
    assert distance(codec.decode(data), Image.open(io.BytesIO(data)).convert("RGB")) <= (2, 0.5)


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCCK"])
def test_cmyk_and_grey_jpeg_agree_with_pillow(photograph, mode):
    image = Image.fromarray(photograph).convert("L" if mode == "L" else "CMYK")
    data = encode(image, quality=95)
    if mode == "YCCK":  # the same data under Adobe's transform 2: other colours, alike in both decoders
        at = data.index(b"Adobe")
        data = data[: at + 11] + b"\x02" + data[at + 12 :]
    worst, mean = distance(codec.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))
    assert worst <= (60 if mode == "YCCK" else 20)  # as of chroma at half the resolution
    assert mean < 1.5


def test_cmyk_becomes_rgb_by_pillows_formula():
    values = rng().integers(0, 256, (300, 7, 4), dtype=np.uint8)
    reference = Image.frombytes("CMYK", (7, 300), (255 - values).tobytes())
    np.testing.assert_array_equal(codec._rgb_of_cmyk(values), np.asarray(reference.convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "webp with alpha", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(photograph, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(photograph[:96, :120])
    if kind == "webp with alpha":
        image.putalpha(255)
    options = {"jpeg": {"quality": 95, "subsampling": 0}, "png": {}, "tiff": {}}.get(kind, {"lossless": True})
    data = encode(image, kind.split()[0], exif=exif, **options)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    header = codec.read_header(data)
    assert (header.height, header.width) == (reference.height, reference.width)
    assert distance(codec.decode(data), reference)[1] <= (1.5 if kind == "jpeg" else 0)
    crop = transform(TransformConfig((50, 40), crop="central", resize_to=56), train=False)
    images = [crop({"image": image, "label": 0}, None)["image"] for image in (data, np.asarray(reference))]
    assert distance(*images)[1] < 1.5


def warned(photograph) -> dict[str, bytes]:
    """JPEGs that libjpeg decodes with a warning."""
    data = encode(photograph, quality=90)
    profile = b"\xff\xe2" + struct.pack(">H", 20) + b"ICC_PROFILE\0\x05\x02abcd"  # part 5 of 2
    return {
        "bad ICC marker": data[:2] + profile + data[2:],
        "extraneous bytes before marker 0xd9": data[:-2] + b"\x11" * 40 + data[-2:],
        "4 extraneous bytes before marker 0xdb": data[: (at := data.index(b"\xff\xdb"))] + b"junk" + data[at:],
        "no end-of-image marker": data[:-2],
    }


@pytest.mark.parametrize("warning", ["bad ICC", "0xd9", "0xdb", "end-of-image"])
def test_a_jpeg_with_a_warning_is_decoded_and_noted(photograph, library, warning):
    ((name, data),) = [(name, data) for name, data in warned(photograph).items() if warning in name]
    whole = codec.decode(encode(photograph, quality=90))
    codec.take_notes()
    np.testing.assert_array_equal(codec.decode(data), whole)
    np.testing.assert_array_equal(codec.decode(data, crop=(200, 30, 101, 50)), whole[200:, 30:80])
    notes = codec.take_notes()
    assert [note.kind for note in notes] == ["warning"] * 2
    assert all(name in note.text for note in notes)


def test_notes_belong_to_their_thread(glass):
    threads = [threading.Thread(target=codec.decode, args=[encode(glass, "png")]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codec.take_notes() == []


def test_one_pixel_is_an_image():
    for kind in ("png", "jpeg", "webp", "bmp"):
        assert codec.decode(encode(np.full((1, 1, 3), 255, np.uint8), kind)).tolist() == [[[255, 255, 255]]]
    tiny = encode(np.full((1, 1, 3), 255, np.uint8))
    for crop in ("inception", "inception_torchvision", "random", "central", "square_central", "resize"):
        config = TransformConfig((8, 8), crop=crop, resize_to=8)
        train = crop in transforms.RANDOM_CROPS
        assert transform(config, train)({"image": tiny, "label": 0}, rng())["image"].min() == 255


def bomb(kind: str) -> bytes:
    """A small file whose header promises 30,000 x 30,000 pixels."""
    if kind == "png":
        body = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    data = bytearray(encode(np.zeros((16, 16, 3), np.uint8)))
    data[(at := data.index(b"\xff\xc0")) + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


def corrupt_files(photograph) -> dict[str, tuple[bytes, str]]:
    jpeg, png, webp = encode(photograph), encode(photograph, "png"), encode(photograph, "webp")
    scan = jpeg.index(b"\xff\xda") + 20
    return {
        "empty": (b"", "empty"),
        "text": (b"This is no image, whatever its name says.", "no known image format"),
        "jpeg header only": (jpeg[:100], "ends inside its header"),
        "jpeg without its last bytes": (jpeg[:-50], "cut off"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "cut off"),
        "truncated with a thumbnail's end": (
            jpeg[: len(jpeg) // 2].replace(b"JFIF", b"\xff\xd9IF"),
            "cut off",
        ),
        "data missing": (jpeg[:scan] + b"\xff\xd9", "premature end"),
        "damaged data": (jpeg[:scan] + b"\xff\x00" * 4000 + jpeg[scan + 8000 :], "premature end"),
        "truncated png": (png[:-500], "cut off"),
        "damaged png": (png[:200] + bytes(2000) + png[2200:], "refuses|decoder"),
        "truncated webp": (webp[:-500], "cut off"),
        "truncated gif": (encode(photograph, "gif")[:900], "gif decoder says"),
        "broken gif": (b"GIF89a" + bytes(40), "gif decoder says: cannot identify image file$"),
        "bmp without pixels": (encode(photograph, "bmp")[:60], "bmp decoder says"),
        "png bomb": (bomb("png"), "30000 x 30000 pixels"),
        "jpeg bomb": (bomb("jpeg"), "30000 x 30000 pixels"),
    }


def test_corrupt_files_are_refused_at_once_with_a_reason(photograph):
    for name, (data, reason) in corrupt_files(photograph).items():
        start = time.monotonic()
        with pytest.raises(codec.CorruptImageError, match=reason):
            codec.decode(data)
        assert time.monotonic() - start < 0.5, name  # nothing of the promised size is touched


def test_damage_above_a_box_is_seen(photograph, library):
    data = encode(photograph)
    at = data.index(b"\xff\xda") + 3000
    assert codec.decode(data, crop=(150, 90, 50, 60)).shape == (50, 60, 3)
    with pytest.raises(codec.CorruptImageError, match="premature end"):
        codec.decode(data[:at] + b"\xff\xd3" + data[at + 2 :], crop=(150, 90, 50, 60))
