"""Greedy continuations: the tokens that the exported model writes must be those that PyTorch writes."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.context import Context
from mixt_export.verification.metrics import tie_tolerances
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Pieces

NAME = "greedy"
TITLE = "Greedy continuations"


def run(context: Context) -> CheckResult:
    """Continue every prompt, then ask the reference in one pass whether it would have chosen each token.

    While all choices agree this is the reference's own greedy continuation, by induction; after a tie both are asked
    about the exported model's text.
    """
    runner, tolerance = context.plain(), context.gate.tolerance
    count = min(context.options.wanted_greedy_tokens, context.max_length - 1)
    total = flips = ties = identical = 0
    needed = 0.0
    with context.progress.task(TITLE, len(context.sequences.prompts)) as advance:
        for prompt in context.sequences.prompts:
            produced = runner.greedy(prompt, count)
            expected = context.torch.logits(np.concatenate([prompt, produced[:-1]]))[len(prompt) - 1 :]
            turns = tie_tolerances(produced, expected)
            total += count
            identical += int(not len(turns))
            ties += int((turns <= tolerance).sum())
            flips += int((turns > tolerance).sum())
            if flips and NAME not in context.routes:
                context.routes[NAME] = Pieces(
                    np.concatenate([prompt, produced[:-1]]), [len(prompt), *[1] * (count - 1)]
                )
            needed = max(needed, float(turns.max(initial=0.0)))
            advance(1)
    allowed = int(np.ceil(context.gate.flip_rate * total))
    reason = f"{flips} of {total} greedy tokens differ from PyTorch's beyond a tie" if flips > allowed else ""
    return CheckResult(
        NAME,
        TITLE,
        not reason,
        reason,
        metrics={
            "prompts": len(context.sequences.prompts),
            "tokens": total,
            "agreement": 1.0 - flips / total,
            "identical_continuations": identical,
            "flips": flips,
            "ties": ties,
            "needed_tolerance": needed,
            "tolerance": tolerance,
        },
    )
