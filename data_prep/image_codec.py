"""JPEG bytes to pixels, by the decoder of training: what decodes here without complaint is what a shard may hold.

libjpeg-turbo through simplejpeg. Its complaints (data that ends early, bytes that no code reads) count as errors.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

SHRINKS = (8, 4, 2)
"""What the inverse transform can divide both sides by while it decodes, at less cost than decoding whole."""


class JpegError(ValueError):
    """The bytes are no JPEG that decodes without complaint; the message is the decoder's."""


def jpeg_header(jpeg: bytes) -> tuple[int, int, str]:
    """(height, width, colour space: Gray, YCbCr, RGB, CMYK or YCCK) of a JPEG. Raises JpegError."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise JpegError(str(error)) from None
    return int(height), int(width), str(space)


def decode_rgb(jpeg: bytes, shrink: int = 1) -> Pixels:
    """The pixels, [height / shrink, width / shrink, 3] rounded up; grey becomes three equal channels. Raises JpegError."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg) if shrink > 1 else (0, 0, "", "")
        pixels: Pixels = simplejpeg.decode_jpeg(
            jpeg, "RGB", min_height=-(-int(height) // shrink), min_width=-(-int(width) // shrink)
        )
    except ValueError as error:
        raise JpegError(str(error)) from None
    return pixels
