"""Truncated SVD of the weight itself (Eckart & Young 1936): the baseline that uses no data for its factors."""

from mixt_export.compression.method import LowRankMethod

METHOD = LowRankMethod(
    name="svd",
    summary="plain truncated SVD of each weight; a baseline",
    family="low rank",
    objective="input-agnostic",
    objectives=("input-agnostic",),
    input_metric="identity",
    output_metric="identity",
    ranks="uniform",
)
