"""Tucker with shared factors: heads of q, k, v and o (TensorLLM, arXiv:2501.15674), gate and up (TT-LLM)."""

from mixt_export.compression.method import Method

METHOD = Method(
    name="tucker",
    summary="multi-head Tucker: factors shared by all heads and by q, k, v and o; needs no text",
    family="tucker",
)
