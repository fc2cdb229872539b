"""Prove that an exported folder computes what PyTorch computes, and say what it needs."""

from mixt_export.verification.memory.predict import MemoryPrediction, predict_memory
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.report import Report
from mixt_export.verification.result import CheckResult
from mixt_export.verification.verifier import verify

__all__ = ["CheckResult", "MemoryPrediction", "Report", "VerifyOptions", "predict_memory", "verify"]
