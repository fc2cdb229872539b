"""Generalised Fisher-weighted SVD (arXiv 2505.17974): whitened on the input by the Gram, on the output by the Fisher.

The Fisher matrix of a linear's weight is approximated by a Kronecker product of the input's and the output gradient's
second moments (K-FAC, Martens & Grosse 2015). Tails then estimate the increase of the loss itself, so they compare
between linears and ranks can be water-filled over the whole model.
"""

from mixt_export.compression.method import OBJECTIVES, LowRankMethod

METHOD = LowRankMethod(
    name="gfw-svd",
    summary="input and gradient whitening with water-filled ranks; the default",
    family="low rank",
    objective="input-aware",
    objectives=tuple(OBJECTIVES),
    input_metric="cholesky",
    output_metric="fisher",
    ranks="water-filling",
)
