"""Phantoms: made-up medical images that come with masks, questions, answers and reasoning. The module to import.

phantom = draw_phantom("train", seed=0, index=17)
for sample in ask(phantom):
    print(sample.question, sample.answer)
"""

from vitalrt_training.data.drawing import MODALITIES, draw_phantom
from vitalrt_training.data.phantom_files import write_phantoms
from vitalrt_training.data.questions import ask
from vitalrt_training.data.records import SPLITS, Phantom, Sample, Target

__all__ = ["MODALITIES", "SPLITS", "Phantom", "Sample", "Target", "ask", "draw_phantom", "write_phantoms"]
