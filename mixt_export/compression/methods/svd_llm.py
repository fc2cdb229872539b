"""SVD-LLM (arXiv 2403.07378): the SVD is truncated after whitening the input, ||W X - W' X||."""

from mixt_export.compression.method import LowRankMethod

METHOD = LowRankMethod(
    name="svd-llm",
    summary="input whitening: the error of each layer's output on the dense model's inputs",
    family="low rank",
    objective="input-aware",
    objectives=("input-aware", "shift-aware"),
    input_metric="cholesky",
    output_metric="identity",
    ranks="uniform",
)
