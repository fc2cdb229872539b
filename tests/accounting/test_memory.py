"""Memory by liveness: against the exported graph's own prediction, and by hand for tensor mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixt_export import export
from mixt_export.accounting import Request, account, open_source
from mixt_export.accounting.forms import forms_of
from mixt_export.network import build
from mixt_export.verification.memory import predict_memory
from tests.tiny import write_tiny

SEQ, BATCH = 24, 3


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dense_against_the_graph(tmp_path: Path, model_type: str, dtype: str) -> None:
    folder = write_tiny(tmp_path / "model", model_type, tied=False, hidden_size=64, vocab_size=600)
    export(folder, tmp_path / "out", target="ort", dtype=dtype, verify=False)
    report = account(open_source(str(folder)), None, Request(), seq=SEQ, batch=BATCH)
    memory = report["variants"][0]["memory"][dtype]["dense"]
    tables = 2 * 256 * 8 * (4 if dtype == "float32" else 2)  # rotary: cosine and sine of 256 positions
    for phase, seq in (("prefill", SEQ), ("decode", 1)):
        graph = predict_memory(tmp_path / "out", batch=BATCH, seq=seq, total=SEQ)
        assert 0 <= graph.weights - tables - memory[phase]["weights"] <= 512  # constants of shapes
        assert memory[phase]["kv_cache"] == graph.kv_cache
        assert memory[phase]["scores"] == graph.workspace
        # The graph has masks, positions and casts besides; a block's values decide in prefill.
        assert 0 <= graph.activations - memory[phase]["activations"] <= 0.25 * graph.activations
        assert memory[phase]["total"] == sum(
            memory[phase][part] for part in ("weights", "kv_cache", "activations", "scores")
        )
    assert memory["prefill"]["where"] == "activation"
    assert memory["decode"]["where"] == "lm_head"


def test_activations_by_hand(tmp_path: Path) -> None:
    """Where gate, up and their product live: residual + 3 · ffn, and what MixT's last product holds in up_proj."""
    folder = write_tiny(tmp_path / "model")
    report = account(open_source(str(folder)), "mixt", Request(blocks="1"), seq=SEQ, batch=BATCH)
    dense, mixt, low = (variant["memory"]["float32"] for variant in report["variants"])
    tokens, hidden, ffn = BATCH * SEQ, 48, 104
    assert dense["dense"]["prefill"]["activations"] == 4 * tokens * (hidden + 3 * ffn)
    assert low["branches"]["prefill"]["activations"] == 4 * tokens * (hidden + 3 * ffn)
    # up_proj: residual, its input, gate and up, which so far holds the sum; a moved product beside the product it is.
    assert mixt["branches"]["prefill"]["activations"] == 4 * tokens * (2 * hidden + 2 * ffn + 2 * ffn)
    assert mixt["branches"]["prefill"]["where"] == "up_proj"
    saved = dense["dense"]["prefill"]["weights"] - mixt["branches"]["prefill"]["weights"]
    block = 2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 104
    assert saved == 4 * (block - block // 16)
    assert mixt["dense"]["prefill"] == dense["dense"]["prefill"]


@pytest.mark.parametrize(("inside", "out"), [(64, 48), (48, 64)])
def test_workspace_of_forms(inside: int, out: int) -> None:
    costs = forms_of(build.mixt("x", inside, out, 4))
    moved = max(inside + out, 2 * out)  # input moved and product, product and product moved
    # While the second window runs the first one's result is held; the output itself is counted elsewhere.
    assert costs["branches"].workspace == out + moved - out
    assert costs["pairs"].workspace == max(moved, out + out) - out
    assert costs["dense"].workspace == 0
    assert forms_of(build.low_rank("x", inside, out, 7))["branches"].workspace == 7


def test_padding_costs_workspace() -> None:
    exact, padded = (forms_of(build.mixt("x", 104, 48, 2, paper_padding=wide)) for wide in (False, True))
    assert padded["branches"].workspace > exact["branches"].workspace


def test_a_large_vocabulary_is_the_peak_of_a_step(tmp_path: Path) -> None:
    report = account(open_source("smollm2-135m"), None, Request(), seq=100, batch=2)
    step = report["variants"][0]["memory"]["float16"]["dense"]["decode"]
    assert (step["activations"], step["where"]) == (2 * 49152 * (2 + 4), "lm_head")
    assert step["kv_cache"] == 2 * 100 * 2 * 30 * 3 * 64 * 2
    json.dumps(report)
