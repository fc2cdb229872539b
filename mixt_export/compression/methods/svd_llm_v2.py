"""SVD-LLM v2 (arXiv 2503.12340): whitening by the eigendecomposition of X Xᵀ, and ranks by each type's loss."""

from mixt_export.compression.method import LowRankMethod

METHOD = LowRankMethod(
    name="svd-llm-v2",
    summary="input whitening by eigendecomposition; less is taken where the error is large",
    family="low rank",
    objective="input-aware",
    objectives=("input-aware", "shift-aware"),
    input_metric="eigen",
    output_metric="identity",
    ranks="svd-llm-v2",
)
