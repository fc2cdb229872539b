"""LASER (arXiv:2312.13558): truncated SVDs of single weights, chosen one by one by the loss they lead to."""

from mixt_export.compression.method import Method

METHOD = Method(
    name="laser",
    summary="truncated SVD of the linears whose truncation lowers the loss on a text, found by greedy search",
    family="laser",
)
