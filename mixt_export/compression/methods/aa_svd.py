"""AA-SVD (arXiv 2604.02119): anchored to the dense output, adapted to the compressed model's inputs, layer by layer."""

from mixt_export.compression.method import OBJECTIVES, LowRankMethod

METHOD = LowRankMethod(
    name="aa-svd",
    summary="anchored and adaptive: dense outputs from the compressed model's inputs, layer after layer",
    family="low rank",
    objective="anchored",
    objectives=tuple(OBJECTIVES),
    input_metric="cholesky",
    output_metric="identity",
    ranks="uniform",
)
