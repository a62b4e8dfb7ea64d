"""vitalrt: fast, inspectable latent reasoning for medical multimodal language models.

Research use only, not for clinical decisions.
"""

from vitalrt.api import Model, generate, load
from vitalrt.engine.request import Answer, Request, Terms, Timings, Usage
from vitalrt.errors import CapacityError, CheckpointError, InputError, VitalError
from vitalrt.inputs.image import ReadOptions
from vitalrt.inputs.prompt import Prompt

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CapacityError",
    "CheckpointError",
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
