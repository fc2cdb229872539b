"""What a model needs: predicted from the graph alone, and measured in a fresh process."""

from mixt_export.verification.memory.predict import MemoryPrediction, predict_memory

__all__ = ["MemoryPrediction", "predict_memory"]
