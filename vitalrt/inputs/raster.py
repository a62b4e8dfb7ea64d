"""PNG, JPEG, TIFF, BMP, WebP and GIF, and pictures handed over as PIL images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.options import ReadOptions
from vitalrt.inputs.pixels import apply_window, as_rgb, check_finite, check_size, robust_window, uint16_to_uint8

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
"""All that PIL may try: its other readers run programs (EPS) or are rarely used and rarely tested."""

_EXIF_ORIENTATION = 0x0112
_PLAIN_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def read_raster(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    """The bytes of one picture file -> uint8 RGB [H, W, 3], upright as its EXIF orientation says.

    Raises InputError for a damaged or truncated file, a frame that is not there, or more than MAX_PIXELS pixels.
    """
    options.refuse(label, "PNG, JPEG, TIFF and the like", "slice_index", "axis")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if options.frame:
            check_size(label, *image.size)  # seeking decodes the frames before
            num_frames = getattr(image, "n_frames", 1)
            if options.frame >= num_frames:
                raise InputError(f"{label}: frame={options.frame} is out of range, the file holds {num_frames}")
            image.seek(options.frame)
        return _to_rgb(image, options, label)
    except InputError:
        raise
    except UnidentifiedImageError:
        trouble = "damaged, truncated or not supported (its header cannot be read)"
    except Image.DecompressionBombError:
        trouble = f"its header claims more pixels than the limit of {limits.MAX_PIXELS:,} pixels"
    except Exception as error:  # PIL's readers raise whatever their parser trips over
        trouble = f"damaged, truncated or not supported ({_first_line(error)})"
    raise InputError(f"{label}: {trouble}")


def read_pil(image: Image.Image, options: ReadOptions, label: str) -> np.ndarray:
    """A PIL image at its current frame -> uint8 RGB [H, W, 3], upright as its EXIF orientation says."""
    options.refuse(label, "a PIL image", "frame", "slice_index", "axis")
    try:
        return _to_rgb(image, options, label)
    except InputError:
        raise
    except Exception as error:
        trouble = _first_line(error)
    raise InputError(f"{label}: cannot be decoded ({trouble})")


def _to_rgb(image: Image.Image, options: ReadOptions, label: str) -> np.ndarray:
    check_size(label, *image.size)
    image.load()  # before the orientation is read: PIL turns TIFF images itself, and drops the tag
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if is_16_bit or image.mode in ("I", "F"):
        # PIL cannot convert these without clipping at 255.
        values = np.asarray(image)
        check_finite(label, values)
        window = options.given_window(label)
        if window is not None:
            picture = apply_window(values, window)
        elif is_16_bit:
            picture = uint16_to_uint8(values)
        else:
            picture = apply_window(values, robust_window(values))
    elif image.mode in _PLAIN_MODES:
        options.refuse(label, "a picture of 8 bits per channel", "window")
        picture = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    else:
        raise InputError(f"{label}: colour mode {image.mode} is not supported; save it as RGB or greyscale")
    return as_rgb(_turn_upright(picture, image.getexif().get(_EXIF_ORIENTATION, 1)))


def _turn_upright(picture: np.ndarray, orientation: object) -> np.ndarray:
    """Undo an EXIF orientation (1..8; anything else means upright). [H, W, ...], H and W trade places for 5..8."""
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return picture


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
