"""TD-MoE (arXiv:2606.03465): the experts of a layer as one tensor, with factors of input and output that all share."""

from mixt_export.compression.method import Method

METHOD = Method(
    name="td-moe",
    summary="mixture of experts: Tucker decomposition over the experts of a layer, shared input and output factors",
    family="td-moe",
)
