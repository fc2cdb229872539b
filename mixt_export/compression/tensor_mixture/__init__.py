"""MixT (Tensor Mixture, arXiv:2605.25344): closed forms and the pass over a model that makes one."""
