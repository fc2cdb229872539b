"""`mixt export` and `mixt-export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixt_export.cli.options import from_toml

if TYPE_CHECKING:
    from mixt_export.targets import ExportPlan, ExportResult

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def export(
    model_dir: Annotated[Path, typer.Argument(help="Model folder: Hugging Face, dense or compressed by mixt.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    target: Annotated[str, typer.Option(help="ort (ONNX Runtime, GenAI) or onnx (portable, opset 23).")] = "ort",
    dtype: Annotated[str, typer.Option(help="fp32 or fp16, of weights and activations.")] = "fp32",
    fp16: Annotated[bool, typer.Option("--fp16", help="The same as --dtype fp16.")] = False,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence (default: the model's, at most 8192).")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Only the first N blocks, for a quick look.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder this tool wrote.")] = False,
    verify: Annotated[bool, typer.Option(help="Prove the result against PyTorch.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Options from a TOML file; the command line wins.", is_eager=True, callback=from_toml),
    ] = None,
) -> None:
    """Write a (compressed) model as an ONNX folder and prove it against PyTorch."""
    from mixt_export.cli.draw import RichProgress
    from mixt_export.errors import UsageError
    from mixt_export.targets import export as run
    from mixt_export.targets import plan_export

    precision = "fp16" if fp16 else dtype
    if dry_run:
        plan = plan_export(model_dir, target=target, dtype=precision, max_seq_len=max_seq_len, num_layers=num_layers)
        _describe(plan)
        _predict(plan)
        typer.echo("dry run: nothing was written.")
        return
    if output is None:
        raise UsageError("the output folder is missing; name it with -o.")
    result = run(
        model_dir,
        output,
        target=target,
        dtype=precision,
        max_seq_len=max_seq_len,
        num_layers=num_layers,
        overwrite=overwrite,
        verify=verify,
        progress=RichProgress(),
    )
    _describe(result.plan)
    _conclude(result)


def _describe(plan: ExportPlan) -> None:
    factors = len(plan.checkpoint.factors)
    decoder = plan.decoder
    typer.echo(
        f"{decoder.model_type}, {len(decoder.blocks)} layers, {factors} of {len(decoder.linears)} linears factorised "
        f"→ {plan.target.name} ({plan.target.dialect.name} dialect, opset {plan.target.dialect.opset}), "
        f"{plan.lowered.weights.dtype}"
    )
    per_token = plan.kv_bytes_per_token
    typer.echo(
        f"graph {len(plan.lowered.model.graph)} nodes · weights {plan.weight_bytes / 1e6:.1f} MB "
        f"({plan.written_bytes / 1e6:.1f} MB of them written anew) · KV cache {per_token / 1e3:.1f} kB per token, "
        f"{per_token * plan.max_seq_len / 1e6:.1f} MB at {plan.max_seq_len} tokens"
    )


def _predict(plan: ExportPlan) -> None:
    """Memory by liveness over the graph, for a prefill and for the last step of the longest sequence."""
    import onnx_ir as ir

    from mixt_export.verification import predict_memory

    proto = ir.serde.serialize_model(plan.lowered.model)
    prompt = min(256, plan.max_seq_len)
    for what, seq, total in (
        (f"prefill of {prompt}", prompt, prompt),
        (f"step at {plan.max_seq_len}", 1, plan.max_seq_len),
    ):
        needs = predict_memory(proto, seq=seq, total=total)
        parts = needs.weights, needs.kv_cache, needs.activations, needs.workspace
        weights, cache, activations, attention = (part / 1e6 for part in parts)
        typer.echo(
            f"predicted memory, {what}: weights {weights:.1f} + KV cache {cache:.1f} + activations {activations:.1f} + "
            f"attention {attention:.1f} = {sum(parts) / 1e6:.1f} MB"
        )


def _conclude(result: ExportResult) -> None:
    from mixt_export.errors import ParityError

    how = "linked" if result.linked else "copied"
    if result.report is None:
        typer.echo(f"wrote {result.path} in {result.seconds:.1f} s (weights {how}); NOT VERIFIED (--no-verify)")
        return
    from mixt_export.cli.verify import print_report

    typer.echo(f"wrote {result.path} in {result.seconds:.1f} s (weights {how})")
    print_report(result.report)
    if not result.ok:
        raise ParityError(f"{result.path}: the export does not compute what PyTorch computes; see report.html there.")
