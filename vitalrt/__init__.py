"""vitalrt: fast, inspectable latent reasoning for medical multimodal language models.

Research use only, not for clinical decisions.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalrt.api import Model, generate, load
    from vitalrt.engine.request import Answer, Request, Terms, Timings, Usage
    from vitalrt.errors import CapacityError, CheckpointError, InputError, VitalError
    from vitalrt.explain.explanation import Explanation
    from vitalrt.inputs.image import ReadOptions
    from vitalrt.inputs.prompt import Prompt

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CapacityError",
    "CheckpointError",
    "Explanation",
    "InputError",
    "Model",
    "Prompt",
    "ReadOptions",
    "Request",
    "Terms",
    "Timings",
    "Usage",
    "VitalError",
    "generate",
    "load",
]

_MODULES = ("api", "engine.request", "errors", "explain.explanation", "inputs.image", "inputs.prompt")


def __getattr__(name: str) -> Any:
    """Public names and modules when they are first asked for: a part of vitalrt needs no more than its own imports.

    bench.gpu and the kernels' tests so run from a source checkout, without the C++ core and the readers of images.
    """
    if name in __all__:
        modules = (import_module(f"{__name__}.{module}") for module in _MODULES)
        return next(getattr(module, name) for module in modules if name in vars(module))
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
