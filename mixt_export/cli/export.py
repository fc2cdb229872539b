"""`mixt export` and `mixt-export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixt_export.cli.export_trt import describe_trt, judge_fit
from mixt_export.cli.options import from_toml

if TYPE_CHECKING:
    from mixt_export.plan import FormPlan
    from mixt_export.targets import ExportPlan, ExportResult

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def export(
    model_dir: Annotated[Path, typer.Argument(help="Model folder: Hugging Face, dense or compressed by mixt.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    target: Annotated[str, typer.Option(help="ort (ONNX Runtime, GenAI), onnx (portable) or trt (TensorRT).")] = "ort",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or, for trt, bf16: weights and activations.")] = "fp32",
    fp16: Annotated[bool, typer.Option("--fp16", help="The same as --dtype fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="The same as --dtype bf16.")] = False,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence (default: the model's, at most 8192).")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Only the first N blocks, for a quick look.")] = None,
    optimize_for: Annotated[
        str, typer.Option(help="Choose executable forms of MixT linears for: balanced, decode, prefill or memory.")
    ] = "balanced",
    form: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=FORM", help="Form of the MixT linears that match, e.g. k_proj=dense. Repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="trt: the board, such as orin-nano-8gb; decides the dialect and what fits.")
    ] = None,
    jetpack: Annotated[int | None, typer.Option(help="trt: JetPack 6 (TensorRT 10.3) or 7 (10.15 or later).")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="trt: most sequences at once (default 1).")] = None,
    max_input_len: Annotated[
        int | None, typer.Option(min=1, help="trt: most new tokens at once (default 512); longer prompts go in pieces.")
    ] = None,
    island: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT", help="trt: keep in float32: residual, attention.N, or a linear's name. Repeatable."
        ),
    ] = None,
    scan: Annotated[
        bool | None,
        typer.Option("--scan/--no-scan", help="trt at fp16: look for overflow first (default: if verified)."),
    ] = None,
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
    from mixt_export.targets.trt import TrtOptions

    precision = _precision(dtype, fp16=fp16, bf16=bf16)
    trt = TrtOptions(jetpack, device, max_batch, max_input_len, tuple(island or ()), scan)
    forms = [_override(text) for text in form or ()]
    if dry_run:
        if scan:
            raise UsageError("--scan runs the model, --dry-run reads no weight; leave one out.")
        plan = plan_export(
            model_dir,
            target=target,
            dtype=precision,
            max_seq_len=max_seq_len,
            num_layers=num_layers,
            optimize_for=optimize_for,
            forms=forms,
            trt=trt,
        )
        _describe(plan)
        _predict(plan)
        typer.echo("dry run: nothing was written.")
        judge_fit(plan)
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
        optimize_for=optimize_for,
        forms=forms,
        trt=trt,
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
    _describe_forms(plan.forms)
    describe_trt(plan)


def _precision(dtype: str, *, fp16: bool, bf16: bool) -> str:
    """The dtype that --dtype, --fp16 and --bf16 ask for together; UsageError where they contradict each other."""
    from mixt_export.errors import UsageError
    from mixt_export.targets.registry import EXPORT_DTYPES

    asked = [name for name, flag in (("fp16", fp16), ("bf16", bf16)) if flag]
    if len(asked) == 2:
        raise UsageError("--fp16 and --bf16 contradict each other; give one.")
    if not asked:
        return dtype
    if dtype != "fp32" and EXPORT_DTYPES.get(dtype) != EXPORT_DTYPES[asked[0]]:
        raise UsageError(f"--dtype {dtype} and --{asked[0]} contradict each other; give one.")
    return asked[0]


def _override(text: str) -> tuple[str, str]:
    """REGEX=FORM; the expression may hold equals signs."""
    from mixt_export.errors import UsageError

    pattern, found, wanted = text.rpartition("=")
    if not found or not pattern:
        raise UsageError(f"--form {text}: write REGEX=FORM, for example --form 'k_proj|v_proj=dense'.")
    return pattern, wanted


def _describe_forms(forms: FormPlan) -> None:
    """What the MixT linears became, equal decisions on one line."""
    if not forms.choices:
        return
    stored, planned, dense = forms.stored_elements, forms.planned_elements, forms.dense_elements
    typer.echo(
        f"MixT linears, optimised for {forms.objective.name}: {planned:,} weights in the graph, {stored:,} stored, "
        f"{dense:,} dense"
    )
    alike: dict[tuple[str, str], list[str]] = {}
    for name, choice in forms.choices.items():
        what = f"{len(choice.mixture.terms)} terms {choice.form.in_features}→{choice.form.out_features}: "
        alike.setdefault((what + choice.form.name, choice.reason), []).append(name.rpartition(".")[2])
    for (what, reason), names in alike.items():
        typer.echo(f"  {what} × {len(names)} ({', '.join(dict.fromkeys(names))}): {reason}")


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
