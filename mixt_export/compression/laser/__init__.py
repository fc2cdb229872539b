"""LASER (arXiv:2312.13558): which single weights to truncate, found by the loss they lead to."""
