"""Every error that vitalrt raises on purpose."""

from __future__ import annotations


class VitalError(ValueError):
    """Base of all errors a caller can mend. Its one-line text names the argument, what was expected and what came.

    Texts never hold patient data: no DICOM field values, no pixel data, no question or answer text.
    """


class InputError(VitalError):
    """An image, question or prompt that cannot be read or used."""


class CheckpointError(VitalError):
    """A model or adapter directory that cannot be loaded."""


class CapacityError(VitalError):
    """A request that does not fit the engine's cache; raised before any work starts."""
