"""MixT (arXiv:2605.25344): a linear becomes a sum of small tensors on overlapping windows of its features."""

from mixt_export.compression.method import Method

METHOD = Method(
    name="mixt",
    summary="tensor mixture: token-weighted least squares block after block, then block refinement",
    family="mixt",
)
