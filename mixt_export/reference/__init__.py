"""PyTorch execution of a model folder: what exported models are judged against."""

from mixt_export.reference.load import load_reference

__all__ = ["load_reference"]
