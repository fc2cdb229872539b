"""Tucker decompositions: attention heads stacked (TensorLLM, arXiv:2501.15674), gate and up stacked (TT-LLM)."""
