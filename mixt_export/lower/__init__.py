"""From wiring and factorised linears to an ONNX graph, built directly (not traced), weights by reference."""

from mixt_export.lower.decoder import LoweredModel, factors_of, lower_decoder
from mixt_export.lower.dialects import DIALECTS, Dialect

__all__ = ["DIALECTS", "Dialect", "LoweredModel", "factors_of", "lower_decoder"]
