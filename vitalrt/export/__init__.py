"""What a site deploys: a checkpoint with its adapter merged, or as ONNX graphs; and ONNX Runtime as an engine."""

from vitalrt.export.exporter import Export, Plan
from vitalrt.export.exporter import export_onnx as onnx
from vitalrt.export.exporter import plan_onnx as plan
from vitalrt.export.merged import merged
from vitalrt.export.verify import Verification

__all__ = ["Export", "Plan", "Verification", "merged", "onnx", "plan"]
