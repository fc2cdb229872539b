"""Parameters of families beyond Llama's kin: as many as a folder of theirs holds; memory of a block by hand."""

from __future__ import annotations

from math import prod

import pytest

from mixt_export.accounting.compute import form_costs
from mixt_export.accounting.memory import peak_memory
from mixt_export.accounting.methods import Variant
from mixt_export.accounting.parameters import count
from mixt_export.families import decoder_of
from tests.tiny import tiny_config, tiny_shapes
from tests.tiny_families import CONFIGS

DENSE = Variant("dense", "dense", {})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_a_folder(family: str, tied: bool) -> None:
    config = tiny_config(family, tied=tied)
    counted = count(decoder_of(config), DENSE)
    assert counted.total == sum(prod(shape) for shape in tiny_shapes(config).values())


def test_live_activations_of_a_parallel_block() -> None:
    """GPT-J's norm is read by both branches: residual, norm, hidden and its activation live at once, or q, k and v."""
    decoder = decoder_of(tiny_config("gptj"))
    parameters, costs = count(decoder, DENSE), form_costs(decoder, DENSE)["dense"]
    memory = peak_memory(decoder, parameters, costs, dtype="float32", batch=1, new=200, positions=200)
    assert (memory.where, memory.activations) == ("attention", (64 + 64 + 3 * 64 + 64) * 200 * 4)
    gpt2 = decoder_of(tiny_config("gpt2"))
    parameters, costs = count(gpt2, DENSE), form_costs(gpt2, DENSE)["dense"]
    memory = peak_memory(gpt2, parameters, costs, dtype="float32", batch=1, new=200, positions=200)
    assert (memory.where, memory.activations) == ("activation", (48 + 104 + 104) * 200 * 4)
