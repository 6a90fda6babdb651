"""Accuracy of a choice: known values, and a whole model against a literal forward per choice."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.benchmarks.choice import choice_outcome
from pipeline.corpora.choice import build
from pipeline.errors import PipelineError
from pipeline.evaluation.sweep import FULL, Sweep
from pipeline.models import load_tokenizer
from pipeline.params import EvaluationParams, TracesParams
from tests.corpora.test_choice import HUB_ROWS, RENDERED, params, write


@pytest.mark.parametrize(
    ("nll", "answers", "metric", "right"),
    [
        ([3.0, 2.0, 4.0], ["a", "b", "c"], "accuracy", 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], "accuracy", 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], "accuracy_norm", 2),
        # Characters count, not bytes: 4/2 loses against 3/2.
        ([4.0, 3.0], ["éé", "bb"], "accuracy_norm", 1),
        ([2.0, 2.0], ["a", "b"], "accuracy", 0),
        ([2.0, 3.0], ["", "b"], "accuracy_norm", 1),
    ],
)
def test_known_outcomes(nll: list[float], answers: list[str], metric: str, right: int) -> None:
    for gold in range(len(nll)):
        assert choice_outcome(nll, answers, metric, gold) == float(gold == right)


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 30)), min_size=1, max_size=5))
def test_the_norm_divides_by_characters(choices: list[tuple[float, int]]) -> None:
    nll, answers = [value for value, _ in choices], ["x" * length for _, length in choices]
    # lm-eval 0.4.13, ConfigurableTask.process_results.
    lls, completion_len = tuple(-value for value in nll), np.array([float(len(answer)) for answer in answers])
    for gold in range(len(choices)):
        assert choice_outcome(nll, answers, "accuracy", gold) == float(np.argmax(lls) == gold)
        assert choice_outcome(nll, answers, "accuracy_norm", gold) == float(np.argmax(lls / completion_len) == gold)


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(PipelineError, match="'nll' with the right choice 0 is no multiple choice"):
        choice_outcome([1.0], ["a"], "nll", 0)
    with pytest.raises(PipelineError, match="right choice None"):
        choice_outcome([1.0], ["a"], "accuracy", None)


@pytest.mark.parametrize("task", sorted(RENDERED))
def test_the_uncompressed_model_chooses_as_a_forward_per_choice(task: str, tmp_path: Path, smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    evaluation = EvaluationParams(budgets=(20,), n_sink=4, n_recent=16, seed=0)
    traces = TracesParams(block_size=16, query_chunk=32, sequences_per_shard=2)
    sweep = Sweep(model, tokenizer, {}, evaluation, traces, (20,), whole_if_shorter=True)
    source = write(tmp_path / "rows.jsonl", HUB_ROWS[task])
    for late in {False, task == "boolq"}:
        for sample in build(params(task, late_question=late), task, source, smollm2)["test"]:
            context, choices, _ = RENDERED[task][json.loads(sample.meta)["row"]]
            scores = []
            for choice in choices:
                ids = torch.tensor([tokenizer.encode(f"{context} {choice}")])
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1].double().log_softmax(-1)
                first = len(tokenizer.encode(context.rstrip()))
                scores.append(logits.gather(1, ids[0, 1:, None])[first - 1 :].sum().item())
            if task == "hellaswag":
                scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
            # Whatever is called right shows which choice was taken.
            for called_right in range(len(choices)):
                outcomes, _ = sweep.run(dataclasses.replace(sample, gold=called_right), seed=1)
                (full,) = (outcome for outcome in outcomes if outcome.key == FULL)
                assert full.metric == sample.metric
                assert full.value == float(scores.index(max(scores)) == called_right)
