"""What `mixt export --target trt` says: profiles, islands, and whether the board is large enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mixt_export.targets import ExportPlan


def describe_trt(plan: ExportPlan) -> None:
    """Engine limits and float32 islands; nothing for other targets."""
    if plan.trt is None:
        return
    trt, islands = plan.trt, plan.islands
    pack = "desktop RTX" if trt.jetpack is None else f"JetPack {trt.jetpack.number} ({trt.jetpack.oldest} or later)"
    typer.echo(
        f"TensorRT for {pack}: up to {trt.max_batch} sequences, {trt.max_input_len} new tokens, {plan.max_seq_len} "
        f"positions; profiles {', '.join(profile['name'] for profile in trt.profiles)}"
    )
    parts = ["the residual stream"] * islands.residual
    parts += [f"attention of block {index}" for index in sorted(islands.attention)]
    parts += [f"{name} (input × 2^-{power})" for name, power in sorted(islands.shifts.items())]
    if parts:
        typer.echo(f"in float32 besides norms and softmax: {', '.join(parts)}")
    if plan.extremes is not None:
        for kind, found in plan.extremes.largest().items():
            typer.echo(f"  largest |{kind}| over {plan.extremes.tokens} tokens: {found['max']:.4g} at {found['where']}")


def judge_fit(plan: ExportPlan) -> None:
    """Print memory, builder estimate and roofline for the plan's device; raise ResourceError when it will not fit."""
    if plan.trt is None or plan.trt.device is None:
        return
    from mixt_export.targets.fit import CACHE_COPIES, fit

    found = fit(plan)
    device = found.device
    rows = (
        ("weights", found.weights, "exact"),
        (
            "KV cache",
            found.cache,
            f"{found.max_batch} × {found.max_seq_len} tokens, {CACHE_COPIES} × (past and present)",
        ),
        ("activations", found.activations, f"liveness over the graph, {found.max_input_len} new tokens"),
        ("attention", found.attention, "scores of the fused operator, if TensorRT does not fuse them away"),
        ("libraries", found.libraries, "CUDA and TensorRT, assumed"),
    )
    typer.echo(f"{device.title} (compute capability {device.compute_capability}), predicted, never run there:")
    for name, nbytes, note in rows:
        typer.echo(f"  {name:<12}{nbytes / 1e6:>10.1f} MB  {note}")
    typer.echo(
        f"  {'sum':<12}{found.running / 1e6:>10.1f} MB  of {device.usable / 1e6:.0f} MB usable "
        f"({device.visible / 1e6:.0f} MB visible less {device.reserved / 1e6:.0f} MB for the system)"
    )
    typer.echo(f"  {'builder':<12}{found.builder / 1e6:>10.1f} MB  estimate from TensorRT-RTX builds on x86-64")
    typer.echo(
        f"  roofline (a model, at best): decode {found.decode * 1e3:.2f} ms per step at {found.max_seq_len} positions, "
        f"prefill of {found.max_input_len} tokens {found.prefill * 1e3:.1f} ms "
        f"({device.bandwidth / 1e9:g} GB/s, {device.flops / 1e12:g} TFLOPS)"
    )
    found.require()
    swap = f"; building it needs {found.swap / 1e9:.1f} GB of swap" if found.swap else ""
    typer.echo(f"  fits: {(device.usable - found.running) / 1e6:.0f} MB to spare{swap}")
