"""Weights of few bits: blocks of integers with a scale each, how they are rounded and how they are packed."""

from mixt_export.quantisation.blocks import Blocks, dequantised, packed_nbits, unpacked_nbits
from mixt_export.quantisation.nearest import nearest
from mixt_export.quantisation.settings import Quantisation

__all__ = ["Blocks", "Quantisation", "dequantised", "nearest", "packed_nbits", "unpacked_nbits"]
