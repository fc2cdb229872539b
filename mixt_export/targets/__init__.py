"""Targets: what an exported folder holds. One file per target, one line here."""

from __future__ import annotations

from mixt_export.targets.dispatch import export, plan_export
from mixt_export.targets.encoder import EncoderPlan
from mixt_export.targets.export import ExportPlan, ExportResult
from mixt_export.targets.registry import TARGETS, Target

__all__ = ["TARGETS", "EncoderPlan", "ExportPlan", "ExportResult", "Target", "export", "plan_export"]
