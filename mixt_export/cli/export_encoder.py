"""What `mixt export` says of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mixt_export.targets.encoder import EncoderPlan


def describe_encoder(plan: EncoderPlan) -> None:
    """Print what would be or was written."""
    encoder, dialect = plan.encoder, plan.target.dialect
    factors = sum(linear.name in plan.checkpoint.factors for linear in encoder.linears)
    typer.echo(
        f"{encoder.model_type} encoder, {len(encoder.blocks)} layers, {factors} of {len(encoder.linears)} linears "
        f"factorised → {plan.target.name} ({dialect.name} dialect, opset {dialect.opset}), {plan.lowered.weights.dtype}"
    )
    typer.echo(
        f"graph {len(plan.lowered.model.graph)} nodes · weights {plan.weight_bytes / 1e6:.1f} MB "
        f"({plan.written_bytes / 1e6:.1f} MB of them written anew) · up to {plan.max_seq_len} tokens"
    )


def predict_encoder(plan: EncoderPlan) -> None:
    """Print the memory of one sequence of 128 tokens, by liveness over the graph."""
    import onnx_ir as ir

    from mixt_export.verification import predict_memory

    length = min(128, plan.max_seq_len)
    needs = predict_memory(ir.serde.serialize_model(plan.lowered.model), seq=length, total=length)
    typer.echo(
        f"predicted memory, one sequence of {length} tokens: weights {needs.weights / 1e6:.1f} + activations "
        f"{needs.activations / 1e6:.1f} + attention {needs.workspace / 1e6:.1f} = {needs.sum / 1e6:.1f} MB"
    )
