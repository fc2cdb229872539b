"""ASVD (arXiv 2312.05821): columns of the weight are scaled by how large their inputs are, diag(mean|x_j|^alpha)."""

from mixt_export.compression.method import LowRankMethod

METHOD = LowRankMethod(
    name="asvd",
    summary="activation-aware: columns scaled by the mean size of their inputs to the power --asvd-alpha",
    family="low rank",
    objective="input-aware",
    objectives=("input-aware",),
    input_metric="diagonal",
    output_metric="identity",
    ranks="uniform",
)
