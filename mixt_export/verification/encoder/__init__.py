"""Verification of encoders: hidden states and sentence embeddings instead of logits and tokens."""

from mixt_export.verification.encoder.verify import verify_encoder

__all__ = ["verify_encoder"]
