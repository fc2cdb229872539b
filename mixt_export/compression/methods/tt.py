"""Tensor trains (matrix product operators) of rearranged weights (Oseledets 2011; TT-LLM, arXiv:2606.03465)."""

from mixt_export.compression.method import Method

METHOD = Method(
    name="tt",
    summary="tensor train of 2 to 12 cores: TT-SVD, least squares on the layer's outputs, block refinement",
    family="tt",
)
