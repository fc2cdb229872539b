"""The real sample model, through the cache."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from mixt_export.sample import is_complete, make_sample
from mixt_export.sample.texts import EVALUATION


@pytest.fixture(scope="module")
def loaded(smollm2: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.sample
def test_the_folder_is_complete_and_found_again_at_once(smollm2: Path) -> None:
    assert is_complete(smollm2)
    start = time.perf_counter()
    assert make_sample() == smollm2
    assert time.perf_counter() - start < 2.0  # about 5 ms on an idle machine


@pytest.mark.sample
def test_it_answers_a_question(loaded) -> None:
    model, tokenizer = loaded
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.sample
def test_it_predicts_english(loaded) -> None:
    import torch

    model, tokenizer = loaded
    text = EVALUATION["addresses"].read_text(encoding="utf-8")[:6000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss.item())
    assert 10 < perplexity < 40
