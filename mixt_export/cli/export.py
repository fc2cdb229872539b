"""`mixt export` and `mixt-export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base
from mixt_export.cli.export_encoder import describe_encoder, predict_encoder
from mixt_export.cli.export_trt import describe_trt, judge_fit
from mixt_export.cli.options import from_toml
from mixt_export.cli.passes import describe_passes
from mixt_export.cli.quantise import describe_quantised, int8_cache_from, quantisation_from

if TYPE_CHECKING:
    from mixt_export.plan import FormPlan
    from mixt_export.targets import EncoderPlan, ExportPlan, ExportResult

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def export(
    ctx: typer.Context,
    model_dir: Annotated[Path, typer.Argument(help="Model folder: Hugging Face, dense or compressed by mixt.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    base: BaseOption = None,
    target: Annotated[str, typer.Option(help="ort (ONNX Runtime, GenAI), onnx (portable) or trt (TensorRT).")] = "ort",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or, for trt, bf16: weights and activations.")] = "fp32",
    fp16: Annotated[bool, typer.Option("--fp16", help="The same as --dtype fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="The same as --dtype bf16.")] = False,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence (default: the model's, at most 8192).")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Only the first N blocks, for a quick look.")] = None,
    optimize_for: Annotated[
        str,
        typer.Option(help="Choose forms of factorised linears for: balanced, decode, prefill or memory."),
    ] = "balanced",
    form: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=FORM", help="Form of the factorised linears that match, e.g. k_proj=dense. Repeatable."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most that all weights may take, e.g. 400MB or 1.5GiB.")
    ] = None,
    device_constants: Annotated[
        str,
        typer.Option(
            metavar="default|local|FILE",
            help="CPU whose speed decides forms: as measured by calibrate-device here, or in a file.",
        ),
    ] = "default",
    variants: Annotated[
        str,
        typer.Option(
            help="Two forms of a linear in one graph, for few and for many tokens: auto, one (wherever predicted to "
            "help) or none."
        ),
    ] = "auto",
    einsum: Annotated[bool, typer.Option("--einsum", help="Write networks as Einsum nodes, to be read.")] = False,
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
    quantize: Annotated[
        str | None, typer.Option(metavar="int8|int4", help="Weights of few bits, a scale for every block of inputs.")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(metavar="16|32|64|128", help="--quantize: weights that share a scale (int8 16, int4 32, trt 64)."),
    ] = None,
    quantize_head: Annotated[
        str | None, typer.Option(metavar="int8|int4", help="--quantize: the head and the embedding (default int8).")
    ] = None,
    int8_for: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX|none", help="--quantize int4: matrices at 8 bits (default: see docs). Repeatable."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(metavar="int8", help="--quantize int8, ort: what products read as int8 too; prompts run faster."),
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="--quantize: nearest, calibrated (by what each matrix reads), or auto (default).")
    ] = None,
    calib: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="--quantize: UTF-8 text to calibrate on (default: the shipped). Repeatable."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option("--kv-cache", metavar="int8", help="ort: keys and values at 8 bits, ranges from --calib."),
    ] = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="--quantize: do not measure what quantisation costs.")
    ] = False,
    balance: Annotated[
        str,
        typer.Option(
            metavar="auto|none|weights|calibrated",
            help="Scale factors against each other, exactly, so that all reach equally far (auto: at 16 bits, where "
            "they do not).",
        ),
    ] = "auto",
    no_turn: Annotated[
        bool, typer.Option("--no-turn", help="--quantize: do not turn factors (exactly) so that integers fit them.")
    ] = False,
    detect_low_rank: Annotated[
        float | None,
        typer.Option(
            metavar="TOL", help="Factor dense weights whose singular values fall below TOL of the largest, losslessly."
        ),
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
    from mixt_export.targets import EncoderPlan, plan_export
    from mixt_export.targets import export as run
    from mixt_export.targets.constants import constants_named
    from mixt_export.targets.planning import parse_bytes
    from mixt_export.targets.rewriting import Rewriting
    from mixt_export.targets.trt import TrtOptions

    use_base(base)
    precision = _precision(ctx, {"dtype": dtype, "fp16": fp16, "bf16": bf16})
    trt = TrtOptions(jetpack, device, max_batch, max_input_len, tuple(island or ()), scan)
    forms = [_override(text) for text in form or ()]
    constants = constants_named(device_constants, target)
    budget = None if memory_budget is None else parse_bytes(memory_budget, "--memory-budget")
    quantisation = quantisation_from(
        quantize, calib, int8_for,
        cache=kv_cache is not None,
        group=group, head=quantize_head, rounding=rounding, activations=activations,
        measure=False if no_loss else None,
    )  # fmt: skip
    int8_cache = int8_cache_from(kv_cache, calib, no_loss)
    rewriting = Rewriting(balance, detect_low_rank, turn=not no_turn)
    if dry_run:
        if detect_low_rank is not None:
            raise UsageError(
                "--detect-low-rank reads every weight, --dry-run none; ask mixt inspect --detect-low-rank."
            )
        if rewriting.asked:
            raise UsageError(f"--balance {balance} reads weights, --dry-run none; leave one out.")
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
            memory_budget=budget,
            variants=variants,
            einsum=einsum,
            constants=constants,
            trt=trt,
            quantisation=quantisation,
            int8_cache=int8_cache,
        )
        _describe(plan)
        if isinstance(plan, EncoderPlan):
            predict_encoder(plan)
            typer.echo("dry run: nothing was written.")
            return
        describe_quantised(plan)
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
        memory_budget=budget,
        variants=variants,
        einsum=einsum,
        constants=constants,
        trt=trt,
        quantisation=quantisation,
        int8_cache=int8_cache,
        rewriting=rewriting,
        overwrite=overwrite,
        verify=verify,
        progress=RichProgress(),
    )
    _describe(result.plan)
    if not isinstance(result.plan, EncoderPlan):
        describe_quantised(result.plan, result.manifest)
    _conclude(result)


def _describe(plan: ExportPlan | EncoderPlan) -> None:
    from mixt_export.targets import EncoderPlan

    if isinstance(plan, EncoderPlan):
        describe_encoder(plan)
        _describe_forms(plan.forms)
        return
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
    describe_passes(plan.passes)
    describe_trt(plan)


def _precision(ctx: typer.Context, given: dict[str, Any]) -> str:
    """The dtype that --dtype, --fp16 and --bf16 ask for together; UsageError where they contradict each other.

    What stands on the command line wins over a --config file, whichever of the three it is.
    """
    from mixt_export.errors import UsageError
    from mixt_export.targets.registry import EXPORT_DTYPES

    sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in given}
    typed = [name for name in given if sources[name] == "COMMANDLINE"]
    asked = [name for name in typed or given if given[name] and (typed or sources[name] != "DEFAULT")]
    wanted = {name: given["dtype"] if name == "dtype" else name for name in asked}
    if len({EXPORT_DTYPES.get(dtype, dtype) for dtype in wanted.values()}) > 1:
        words = [f"--dtype {given['dtype']}" if name == "dtype" else f"--{name}" for name in asked]
        raise UsageError(f"{' and '.join(words)} contradict each other; give one.")
    return str(next(iter(wanted.values()), given["dtype"]))


def _override(text: str) -> tuple[str, str]:
    """REGEX=FORM; the expression may hold equals signs."""
    from mixt_export.errors import UsageError

    pattern, found, wanted = text.rpartition("=")
    if not found or not pattern:
        raise UsageError(f"--form {text}: write REGEX=FORM, for example --form 'k_proj|v_proj=dense'.")
    return pattern, wanted


def _describe_forms(forms: FormPlan) -> None:
    """What the factorised linears became, equal decisions on one line."""
    if not forms.choices:
        return
    from mixt_export.cli.forms import plan_lines
    from mixt_export.plan.report import plan_entry

    for line in plan_lines(plan_entry(forms)):
        typer.echo(line)


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
