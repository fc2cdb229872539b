"""Mutated input files through every reader: only documented errors, no hang, bounded memory, no path outside.

python -m benchmarks.fuzz [--cases 10000] [--seed 0]

Each case runs under a limit of CPU seconds and of memory (see tests/fuzz/guard.py); on top of it the process may not
map more than LIMIT bytes in all, so that an allocation which numpy does not count fails too.
"""

from __future__ import annotations

import argparse
import resource
import time

from benchmarks.common import publish
from tests.fuzz.campaign import Tally, campaign

#: Address space of the process. Reading needs a few hundred MB with torch and ONNX Runtime loaded.
LIMIT = 16 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    began, tally, shown = time.process_time(), Tally(), 0
    for tally in campaign(given.cases, given.seed):
        for finding in tally.findings[shown:]:
            print(finding, flush=True)
        shown = len(tally.findings)
        if tally.cases % 1000 == 0:
            print(f"{tally.cases} cases, {shown} findings", flush=True)
    publish(
        "fuzz",
        {
            "cases": tally.cases,
            "seed": given.seed,
            "outcomes": dict(sorted(tally.outcomes.items())),
            "findings": [str(finding) for finding in tally.findings],
            "most bytes held in a case": tally.most_bytes,
            "cpu_s": round(time.process_time() - began, 1),
        },
    )
    print(f"{tally.cases} mutated inputs: {shown} findings")
    raise SystemExit(1 if shown else 0)


if __name__ == "__main__":
    main()
