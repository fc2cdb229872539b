"""The tables of docs/benchmarks.md, one for each kind of processor between two marks, and the plot beside each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks.md"
#: Kind of processor -> flags of /proc/cpuinfo of which it has one; the first that fits. Products of few bits take other
#: kernels on each, in every engine, so that a table is of one kind.
KINDS = {"amx": {"amx_int8"}, "vnni": {"avx512_vnni", "avx_vnni"}, "avx2": {"avx2"}, "neon": {"asimd"}}
_COLOURS = {"ours": "tab:blue", "llama.cpp": "tab:orange", "genai": "tab:green", "torch": "tab:red"}
#: The text whose perplexity the plot shows.
_TEXT = "addresses"


def kind_of(flags: Collection[str]) -> str:
    """Key of KINDS for a processor of these ``flags``; "other" where none fits."""
    return next((kind for kind, wanted in KINDS.items() if wanted & set(flags)), "other")


def marks(kind: str) -> tuple[str, str]:
    """What stands before and behind the table of ``kind``."""
    return f"<!-- peers {kind}: written by python -m benchmarks.peers -->", f"<!-- /peers {kind} -->"


def write(result: dict[str, Any], kind: str) -> None:
    """Put the table and the plot of ``result`` into the documentation. Raises ValueError when the marks are missing."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = marks(kind)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE} must hold the marks {begin} and {end} once each, where the table of {kind} is to be")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    plot(result, PAGE.with_name(f"peers_{kind}.svg"))
    PAGE.write_text(f"{before}{begin}\n\n{table(result)}\n{end}{after}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per contender, missing ones with their reason."""
    speeds = result["speed"]
    many = max(speeds, key=int)
    threads = f"{many} threads"
    head = [
        "engine, model, weights",
        "files MB",
        "export s",
        "load s",
        "peak RSS MB",
        "perplexity in / out of domain",
        "decode",
        "prefill",
        "decode × llama.cpp q4_0",
        "prefill × llama.cpp q4_0",
        f"decode, {threads}",
        f"prefill, {threads}",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in result["contenders"].items():
        if "missing" in row:
            lines.append(f"| {name} | not measured: {row['missing']} |" + " |" * (len(head) - 2))
            continue
        cost, score, memory = row["files"]["export"], row["perplexity"], row["memory"]
        one, all_ = speeds["1"]["engines"][name], speeds[many]["engines"][name]
        times = result["times llama.cpp q4_0"]["1"].get(name)
        cells = [
            name,
            f"{row['files']['file_mb']:.0f}",
            "" if cost is None else f"{cost['cpu_s']:.1f}",
            f"{memory['load_cpu_s']:.2f}",
            f"{memory['peak_rss_mb']:.0f}",
            f"{score[_TEXT]:.2f} / {score['novel']:.2f}",
            f"{one['decode']['tokens_per_s']:.0f}",
            f"{one['prefill']['tokens_per_s']:.0f}",
            "1" if times is None else _ratio(times["decode"]),
            "1" if times is None else _ratio(times["prefill"]),
            f"{all_['decode']['tokens_per_s']:.0f}",
            f"{all_['prefill']['tokens_per_s']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['quartile_1']:.2f}–{found['quartile_3']:.2f})"


def plot(result: dict[str, Any], target: Path) -> None:
    """Speed against perplexity, the area of a mark is the size of the files; left decoding, right prefill."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "peers"
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("decode", "prefill"), strict=True):
        for name, row in result["contenders"].items():
            if "missing" in row:
                continue
            x = result["speed"]["1"]["engines"][name][part]["tokens_per_s"]
            y = row["perplexity"][_TEXT]
            axes.scatter(x, y, s=row["files"]["file_mb"], color=_COLOURS[row["engine"]], alpha=0.5, edgecolors="black")
            axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel=f"{part}, tokens per second, one thread")
        axes.grid(visible=True, which="both", alpha=0.2)
    figure.axes[0].set_ylabel("perplexity, in domain (lower is better)")
    figure.suptitle("SmolLM2-135M-Instruct: speed, quality, size of the files (area of the mark)")
    figure.savefig(target, metadata={"Date": None})
