"""Multiple choice against lm-eval itself: its definitions, its cutting of tokens, its likelihoods and outcomes."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.errors import PipelineError
from pipeline.eviction.budget import EvaluationParams
from pipeline.models.load import load_model
from pipeline.models.tokenizer import load_tokenizer
from studies.harness.compare import DEFINITIONS, TOLERANCE, Answered, compare, harness_answers, own_answers
from tests.benchmarks.making import CHOICES, build, choice, write
from tests.benchmarks.test_choice import HUB_FILES, HUB_ROWS, PLAIN_ROWS, RENDERED

EVALUATION = EvaluationParams(budgets=(20,), n_sink=4, n_recent=16, seed=0)
PLAIN_HELLASWAG = [
    PLAIN_ROWS["hellaswag"],
    {"question": "[header] How to: [title] Buy. [step] See  a door", "choices": ["a", "[b] c", "d", "e"], "answer": 1},
]


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: two random layers with the default model's tokenizer."""
    out = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(smollm2)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("task", "rows", "late"),
    [
        *((task, HUB_ROWS[task], task == "boolq") for task in DEFINITIONS),
        ("hellaswag", PLAIN_HELLASWAG, False),
    ],
    ids=[*DEFINITIONS, "hellaswag-plain"],
)
def test_every_row_is_answered_as_by_the_harness(
    task: str, rows: list[dict[str, Any]], late: bool, tmp_path: Path, tiny: Path
) -> None:
    source = tmp_path / "source"
    write(source / HUB_FILES[task][0], rows)
    benchmark = choice(task, len(rows), late_question=late)
    samples = build(benchmark, source, tiny, task)["test"]
    harness = harness_answers(benchmark, source, samples, tiny, "float32", "cpu", tmp_path / "harness")
    model, tokenizer = load_model(tiny, "float32", "cpu"), load_tokenizer(tiny)
    ours = own_answers(benchmark, samples, model, tokenizer, EVALUATION)
    found = compare(harness, ours, TOLERANCE[torch.float32])
    assert found.complete, found
    assert found.rows == len(rows)
    for answered in harness:
        if rows == HUB_ROWS[task]:
            context, choices, _ = RENDERED[task][answered.row]
            texts = tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in answered.input_ids)
            assert texts == tuple(f"{context} {choice}" for choice in choices)


def test_every_multiple_choice_is_compared() -> None:
    assert set(DEFINITIONS) == set(CHOICES)


def test_whatever_differs_is_counted() -> None:
    one = Answered(0, ((1, 2), (1, 3)), (-1.0, -2.0), 1.0)
    assert compare([one, one], [one, one], 1e-3).complete
    for change, counts in {
        "input_ids": (((1, 2), (1, 4)), (1, 2, 2)),
        "outcome": (0.0, (2, 1, 2)),
        "log_likelihoods": ((-1.0, -2.5), (2, 2, 1)),
    }.items():
        value, expected = counts
        found = compare([one, one], [one, dataclasses.replace(one, **{change: value})], 1e-3)
        assert (found.same_tokens, found.same_outcome, found.same_likelihoods) == expected
        assert not found.complete
        assert (found.harness, found.ours) == (1.0, 0.5 if change == "outcome" else 1.0)
        assert found.largest_difference == (0.5 if change == "log_likelihoods" else 0.0)


def test_a_missing_harness_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PipelineError, match=r"lm_eval.*pip install"):
        harness_answers(choice("boolq"), tmp_path, [], tmp_path, "float32", "cpu", tmp_path)
