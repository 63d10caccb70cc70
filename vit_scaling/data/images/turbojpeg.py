"""Decoding a region of a JPEG by libjpeg-turbo 3, called through ctypes.

simplejpeg decodes whole images, and so does PyTurboJPEG 2.6, whose `crop` is the lossless transform. The TurboJPEG API
of libjpeg-turbo 3 skips the inverse DCT and the colours of everything beside and above a region, and all work below
it. The library is the system's libturbojpeg (Debian 12 has version 2, which is passed over), or the one inside
pylibjxl's wheel, whose extension exports the same functions. Where neither is there, `load` returns None.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vit_scaling import UserError

# Names and numbers of turbojpeg.h, which are stable within version 3.
_DECOMPRESS, _RGB, _WARNING = 1, 0, 0
_FAST_UPSAMPLE, _FAST_DCT = 9, 10


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("numerator", "denominator")]


_HANDLE, _BYTES, _INT, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES = {
    "tj3Init": (_HANDLE, (_INT,)),
    "tj3Destroy": (None, (_HANDLE,)),
    "tj3Set": (_INT, (_HANDLE, _INT, _INT)),
    "tj3GetErrorStr": (_BYTES, (_HANDLE,)),
    "tj3GetErrorCode": (_INT, (_HANDLE,)),
    "tj3DecompressHeader": (_INT, (_HANDLE, _BYTES, _SIZE)),
    "tj3SetScalingFactor": (_INT, (_HANDLE, _Factor)),
    "tj3SetCroppingRegion": (_INT, (_HANDLE, _Region)),
    "tj3Decompress8": (_INT, (_HANDLE, _BYTES, _SIZE, ctypes.c_void_p, _INT, _INT)),
}


class TurboJPEG:
    """A loaded library, for any number of threads: each has a decoder of its own."""

    def __init__(self, library: ctypes.CDLL):
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self._own = threading.local()

    def decode(
        self, data: bytes, reduce: int, top: int, left: int, height: int, width: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Returns a region of the image at 1/reduce of its size, and the library's first warning, "" for none.

        `left` is a multiple of the width of the scaled image's blocks; `codec.decode` sees to that. The inverse DCT is
        the fast one, and the chroma upsampling is plain.

        Raises:
            UserError: the library's error.
        """
        library, handle = self._library, self._handle()
        pixels = np.empty((height, width, 3), np.uint8)
        warning = ""
        for call in (
            lambda: library.tj3DecompressHeader(handle, data, len(data)),
            lambda: library.tj3SetScalingFactor(handle, _Factor(1, reduce)),
            lambda: library.tj3SetCroppingRegion(handle, _Region(left, top, width, height)),
            lambda: library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _RGB),
        ):
            if call():
                message = library.tj3GetErrorStr(handle).decode(errors="replace")
                if library.tj3GetErrorCode(handle) != _WARNING:
                    raise UserError(message)
                warning = warning or message
        return pixels, warning

    def _handle(self) -> int:
        try:
            return self._own.decoder.handle
        except AttributeError:
            self._own.decoder = _Decoder(self._library)
            return self._own.decoder.handle


class _Decoder:
    """The library's state for one thread, freed with it."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self.handle = library.tj3Init(_DECOMPRESS)
        for parameter in (_FAST_UPSAMPLE, _FAST_DCT):
            library.tj3Set(self.handle, parameter, 1)

    def __del__(self):
        self._library.tj3Destroy(self.handle)


@functools.cache
def load() -> TurboJPEG | None:
    """Returns the first TurboJPEG 3 library that is found, or None."""
    candidates = [ctypes.util.find_library("turbojpeg")]
    wheel = importlib.util.find_spec("pylibjxl")
    for folder in (wheel and wheel.submodule_search_locations) or ():
        candidates += [str(path) for path in Path(folder).glob("_pylibjxl*")]
    for path in filter(None, candidates):
        try:
            return TurboJPEG(ctypes.CDLL(path))
        except (OSError, AttributeError):  # not loadable, or of version 2, which cannot decode regions
            continue
    return None
