"""`mixt inspect`: say what a model folder or exported folder holds, or what a model without weights would need."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base
from mixt_export.cli.low_rank import find_low_rank, print_low_rank
from mixt_export.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(add_completion=False)

_LONGEST = 100


@app.command()
def inspect(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder or exported folder.", show_default=False)
    ] = None,
    described: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="PRESET|CONFIG",
            help="Count without weights: a preset such as llama2-7b, a config.json, or a model folder's.",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="With --as: mixt or svd, counted beside the dense model.")] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="With --as: last:N, first:N, a list such as 0,3,7-9, or all. Default: last:4 for mixt, all for svd.",
        ),
    ] = None,
    n_tensors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|TYPE=N", help="With mixt: tensors per linear, for all (default 4) or by type. Repeatable."
        ),
    ] = None,
    bond: Annotated[int | None, typer.Option(help="With mixt: local dimension (default 2).")] = None,
    paper_padding: Annotated[
        bool, typer.Option("--paper-padding", help="With mixt: pad features to powers of the bond as published.")
    ] = False,
    keep: Annotated[
        float | None,
        typer.Option(help="Low rank: share of the parameters to keep. With mixt: of the low rank it is compared with."),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="With --as: tokens for which memory is told (default 2048).")] = None,
    batch: Annotated[
        int | None, typer.Option(help="With --as: sequences for which memory is told (default 1).")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Model the times on a board such as agx-orin-64gb, block by block; nothing is measured."),
    ] = None,
    base: BaseOption = None,
    detect_low_rank: Annotated[
        float | None,
        typer.Option(
            metavar="TOL",
            help="Read the weights and name dense linears whose singular values fall below TOL of the largest.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what a model folder or exported folder holds, from headers only; with --as what a model would need."""
    use_base(base)
    counting = {
        "--method": method,
        "--blocks": blocks,
        "--n-tensors": n_tensors or None,
        "--bond": bond,
        "--paper-padding": paper_padding or None,
        "--keep": keep,
        "--seq": seq,
        "--batch": batch,
    }
    if described is not None:
        if model is not None:
            raise UsageError(f"give either the folder {model} or --as {described}, not both.")
        if detect_low_rank is not None:
            raise UsageError("--detect-low-rank reads weights, --as has none; name a model folder.")
        report = _account(described, counting, device)
    else:
        given = [option for option, value in counting.items() if value is not None]
        if given:
            raise UsageError(
                f"{given[0]} counts without weights and needs --as PRESET, a config.json or a model folder."
            )
        if model is None:
            raise UsageError("name a model folder or an exported folder, or --as PRESET to count without weights.")
        if device is not None:
            from mixt_export.cli.times import times_of_folder

            report = times_of_folder(model, device)
        else:
            from mixt_export.inspection import inspect as report_on

            report = report_on(model)
        if detect_low_rank is not None:
            report["low_rank"] = find_low_rank(model, detect_low_rank)
    if as_json:
        import json

        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    _PRINTERS[report["kind"]](console, report)
    if "low_rank" in report:
        print_low_rank(console, report["low_rank"])


def _account(described: str, given: dict[str, Any], device: str | None) -> dict[str, Any]:
    """The accounting report for the options of the command line; None stands for an option's default."""
    from mixt_export.accounting import Request, account, open_source
    from mixt_export.selection import parse_sizes

    for option, methods in _OPTIONS_OF.items():
        if given[option] is not None and given["--method"] not in methods:
            raise UsageError(f"{option} needs --method {' or '.join(methods)}.")
    request = Request(
        blocks=given["--blocks"],
        n_tensors=parse_sizes(given["--n-tensors"] or [], "--n-tensors"),
        bond=2 if given["--bond"] is None else given["--bond"],
        paper_padding=bool(given["--paper-padding"]),
        keep=given["--keep"],
    )
    if device is not None:
        from mixt_export.cli.times import times_of_source

        return times_of_source(described, given["--method"], request, device)
    shape = {"seq": given["--seq"], "batch": given["--batch"]}
    shape = {name: value for name, value in shape.items() if value is not None}
    return account(open_source(described), given["--method"], request, **shape)


#: Options of the counting that only some methods understand.
_OPTIONS_OF = {
    "--blocks": ("mixt", "svd"),
    "--n-tensors": ("mixt",),
    "--bond": ("mixt",),
    "--paper-padding": ("mixt",),
    "--keep": ("svd", "mixt"),
}


def _print_accounting(console: Console, report: dict[str, Any]) -> None:
    from mixt_export.cli.accounting import show

    show(console, report)


def _print_model(console: Console, report: dict[str, Any]) -> None:
    params, kv = report["params"], report["kv_bytes_per_token"]
    facts = {
        "Format": f"{report['format']} ({report['reason']})",
        "Model type": report["model_type"],
        "Weights": f"{_size(report['bytes'])} in {len(report['files'])} file(s): "
        + ", ".join(f"{dtype} {_size(count)}" for dtype, count in report["bytes_by_dtype"].items()),
        "Parameters": f"{params['total']:,}",
        "  embeddings": f"{params['embeddings']:,}" + (" (tied to the head)" if report["tied_embeddings"] else ""),
        "  linears": f"{params['linears']:,}" + _share(params["linears"], params["dense_linears"]),
        "  other": f"{params['other']:,}",
        "KV cache": "unknown"
        if kv is None
        else "none, an encoder has no cache"
        if not kv
        else ", ".join(f"{_size(count)} per token in {dtype}" for dtype, count in kv.items()),
        **{f"info.{key}": value for key, value in _flat(report["info"])},
    }
    console.print(_facts(report["path"], facts))
    console.print(_types(report["types"]))
    if sum(kind["params"] for kind in report["types"].values()) > params["linears"]:
        console.print("(a tensor that linears of several types share counts for each of them)")
    console.print(_layers(report["linears"]))
    from mixt_export.cli.forms import plan_lines

    for line in plan_lines(report["plan"]):
        console.print(line, soft_wrap=True)


def _print_export(console: Console, report: dict[str, Any]) -> None:
    from mixt_export.cli.forms import linears_line, plan_lines, work_lines

    files, manifest = report["files"], dict(report["manifest"])
    plan, linears = manifest.pop("plan", None), manifest.pop("linears", None)
    facts = dict(_flat(manifest))
    facts["linears"] = linears_line(linears)
    facts["Folder"] = f"{len(files)} files, {_size(sum(files.values()))}"
    console.print(_facts(report["path"], facts))
    for line in (*plan_lines(plan), *work_lines(report["work"])):
        console.print(line, soft_wrap=True)


def _print_times(console: Console, report: dict[str, Any]) -> None:
    from mixt_export.cli.times import show

    show(console, report)


_PRINTERS = {"model": _print_model, "export": _print_export, "accounting": _print_accounting, "times": _print_times}


def _facts(title: str, facts: dict[str, Any]) -> Table:
    table = _table(title, "", "")
    for key, value in facts.items():
        table.add_row(_clean(key), _clean(value))
    table.show_header = False
    return table


def _types(types: dict[str, dict[str, Any]]) -> Table:
    table = _table("Linears by type", "type", "count", "factorised", "parameters", "of dense")
    for name, kind in types.items():
        share = _percent(kind["params"], kind["dense_params"])
        table.add_row(_clean(name), str(kind["count"]), str(kind["factorised"]), f"{kind['params']:,}", share)
    return table


def _layers(linears: list[dict[str, Any]]) -> Table:
    """One row per run of equal layers, one column per type of linear: method, ranks, share of the dense parameters."""
    columns = list(dict.fromkeys(entry["type"] for entry in linears))
    layers: dict[int | None, dict[str, str]] = {}
    for entry in linears:
        layers.setdefault(entry["layer"], {})[entry["type"]] = _cell(entry)
    table = _table("Linears by layer: method, rank, share of dense", "layer", *columns)
    for cells, run in groupby(layers.items(), key=lambda item: item[1]):
        numbers = [layer for layer, _ in run]
        first, last = ("–" if number is None else str(number) for number in (numbers[0], numbers[-1]))
        table.add_row(first if first == last else f"{first}–{last}", *(cells.get(column, "") for column in columns))
    return table


def _cell(entry: dict[str, Any]) -> str:
    if not entry["factorised"]:
        return "dense"
    branches = dict.fromkeys("·".join(map(str, bonds)) for bonds in entry["ranks"] if bonds)
    rank = f"\nr {'+'.join(branches)}" if branches else ""
    return f"{_clean(entry['method'])}{rank}\n{100 * entry['share']:.1f} %"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=_clean(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(_clean(column), overflow="fold", no_wrap=number == 0)
    return table


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested objects as dotted keys; a list as its length unless it is short and plain."""
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list) and (len(item) > 8 or any(isinstance(part, dict | list) for part in item)):
            rows.append((f"{prefix}{key}", f"{len(item)} entries"))
        elif isinstance(item, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, item))))
        else:
            rows.append((f"{prefix}{key}", item))
    return rows


def _clean(value: Any) -> str:
    from mixt_export.cli.forms import clean

    return clean(value, _LONGEST)


def _size(count: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count} B"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _share(part: int, whole: int) -> str:
    return f" ({_percent(part, whole)} of dense)" if part != whole else ""
