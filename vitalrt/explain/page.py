"""An explanation as one HTML file: pictures, heat maps and words, nothing fetched from anywhere.

K latent steps, R, C rows and columns of the encoder's patches.
"""

from __future__ import annotations

import base64
import io
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from vitalrt.errors import VitalError
from vitalrt.explain.visual_window import peak_of
from vitalrt.files import replace_whole

if TYPE_CHECKING:
    from vitalrt.explain.explanation import Explanation, Step

LONGEST_SIDE = 768  # pixels of a picture on the page
HEAT_COLOURS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
"""Matplotlib's magma at equal distances: dark to light for every eye."""
MOST_OPAQUE = 0.75
OWNER_ONLY = 0o600
"""Permissions of a page, which is as confidential as its picture."""


def write_page(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """See Explanation.save."""
    html = render(explanation)
    try:
        target = Path(path).resolve()  # a link stays one
        if target.exists() and not target.is_file():
            raise VitalError(f"path: expected an ordinary file, or none yet, got {str(path)!r}")
        replace_whole(target, lambda partial: partial.write_text(html, encoding="utf-8"), OWNER_ONLY)
    except VitalError:
        raise
    except (TypeError, ValueError) as error:  # no path at all, or with a null byte
        raise VitalError(f"path: expected a path, got {path!r}") from error
    except OSError as error:
        raise VitalError(f"path: {path} cannot be written ({error.strerror or error})") from error
    return Path(path)


def render(explanation: Explanation) -> str:
    """The page's HTML."""
    maps = [heatmap for step in explanation.steps for heatmap in step.heatmaps]
    low = min((float(heatmap.min()) for heatmap in maps), default=0.0)
    high = max((float(heatmap.max()) for heatmap in maps), default=1.0)
    scale = {
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "image": _png(heat_colours(torch.linspace(0, 1, 128)[None])),
    }
    answer = explanation.answer
    return _template().render(
        question=explanation.question,
        answer=answer.text,
        cut="" if answer.finish_reason == "stop" else answer.finish_reason,
        notice=explanation.notice,
        missing=list(explanation.missing.items()),
        pictures=[_shown_picture(picture) for picture in explanation.pictures],
        steps=[_shown(step, low, high) for step in explanation.steps],
        scale=scale if maps else None,
        provenance=explanation.provenance,
    )


def heat_colours(shares: torch.Tensor) -> np.ndarray:
    """shares: [R, C], 0 to 1.  Returns uint8 RGBA [R, C, 4], the more opaque the larger the share."""
    values = shares.double().clamp(0, 1).numpy()
    at = np.linspace(0, 1, len(HEAT_COLOURS))
    channels = [np.interp(values, at, channel) for channel in np.array(HEAT_COLOURS).T]
    return np.stack([*channels, values * MOST_OPAQUE * 255], axis=-1).round().astype(np.uint8)


def _shown(step: Step, low: float, high: float) -> dict[str, Any]:
    """low, high: of all heat maps of the page."""
    spread = max(high - low, 1e-6)
    return {
        "text": step.text,
        "probability": None if step.text_probability is None else f"{step.text_probability:.0%}",
        "heat": [
            {
                "image": _png(heat_colours((heatmap - low) / spread)),
                "peak": peak_of(heatmap),
                "cosine": f"{float(heatmap.max()):.2f}",
            }
            for heatmap in step.heatmaps
        ],
        "neighbours": step.neighbours,
    }


def _shown_picture(picture: np.ndarray) -> dict[str, Any]:
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # never larger than it is
    return {"image": _png(np.asarray(image)), "width": image.width, "height": image.height}


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] as a data: address."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@cache
def _template() -> Template:
    loader = PackageLoader("vitalrt.explain", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html.jinja")
