"""The uncompressed model on multiple choice, by the EleutherAI harness itself beside our own evaluation.

lm-eval 0.4.13 runs its own definitions of the tasks with its own model class; only where it finds the rows is
overridden. It is imported when it is asked, because only this comparison needs it.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.benchmarks.base import Answer
from pipeline.benchmarks.base_choice import MultipleChoice
from pipeline.errors import PipelineError
from pipeline.evaluation.ask import ask, reserve
from pipeline.evaluation.evict import evict
from pipeline.evaluation.sweep import Sweep
from pipeline.eviction.budget import EvaluationParams
from pipeline.files import write_text
from pipeline.samples.rows import Row
from pipeline.samples.sample import Sample

# Kind of a benchmark -> its definition below lm_eval/tasks.
DEFINITIONS = {
    "boolq": "super_glue/boolq/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "mmlu": "mmlu/default/mmlu_{subject}.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
# The evaluated split is among them; of the others it reads one row, for examples that zero-shot does not show.
_SPLITS = ("train", "validation", "test", "dev")
# Rows that the harness runs at once.
_BATCH = 8
# Both sides compute in the model's dtype but sum in another order; a log-likelihood is a sum of a few to some dozen
# terms, each of which is off by a few units in the last place of a logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Answered:
    """How a model answered one row.

    Attributes
    ----------
    row
        Place of the row in its source.
    input_ids
        Token ids of prompt and choice, per choice.
    log_likelihoods
        Of the choices, nats, summed over tokens.
    outcome
        1.0 if the choice that was taken is right, else 0.0.
    """

    row: int
    input_ids: tuple[tuple[int, ...], ...]
    log_likelihoods: tuple[float, ...]
    outcome: float


@dataclass(frozen=True)
class Agreement:
    """What both sides say of the same rows.

    Attributes
    ----------
    rows
        How many.
    harness, ours
        Accuracy, a fraction.
    same_tokens, same_outcome, same_likelihoods
        Rows whose token ids, whose outcomes, and whose log-likelihoods, up to ``TOLERANCE``, are equal.
    largest_difference
        Of any log-likelihood, nats.
    """

    rows: int
    harness: float
    ours: float
    same_tokens: int
    same_outcome: int
    same_likelihoods: int
    largest_difference: float

    @property
    def complete(self) -> bool:
        """Whether every row agrees in everything."""
        return self.rows == self.same_tokens == self.same_outcome == self.same_likelihoods


def harness_row(kind: str, row: Row) -> Row:
    """A row, as ``MultipleChoice.read_rows`` gives it, in the columns that the harness reads, those of the hub."""
    match kind:
        case "boolq":
            return {"question": row["question"], "passage": row["passage"], "label": row["answer"]}
        case "arc_challenge" if not isinstance(row["choices"], dict):
            letters = [chr(ord("A") + place) for place in range(len(row["choices"]))]
            choices = {"text": row["choices"], "label": letters}
            return {"question": row["question"], "choices": choices, "answerKey": letters[row["answer"]]}
        case "arc_challenge":
            return {name: row[name] for name in ("question", "choices", "answerKey")}
        case "mmlu":
            return {name: row[name] for name in ("question", "choices", "answer", "subject")}
        case _ if "ctx_a" in row:
            return {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")}
        case _:
            # The plain form has lost the activity's label. The harness puts a colon and a space behind it, and drops
            # whatever stands in brackets: so it drops those as well.
            plain = {"activity_label": "[", "ctx_a": f"]{row['question']}", "ctx_b": ""}
            return plain | {"endings": row["choices"], "label": str(row["answer"])}


def harness_answers(
    benchmark: MultipleChoice,
    source: Path,
    samples: Sequence[Sample],
    model: Path,
    dtype: str,
    device: str,
    scratch: Path,
) -> list[Answered]:
    """The rows of ``samples``, in their order, as lm-eval's ``HFLM`` answers them.

    Parameters
    ----------
    benchmark
        One whose ``kind`` is in :data:`DEFINITIONS`.
    source
        What the samples were built from.
    model
        Exported model directory, which the harness loads itself.
    scratch
        Directory for the harness's definitions, rows and caches.

    Raises
    ------
    PipelineError
        lm-eval is not installed.
    """
    try:
        from lm_eval import tasks as definitions
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"The harness needs a module that is missing ({error}); pip install '.[harness]'."
        ) from None
    rows = [row for row, _ in benchmark.read_rows(source)]
    metric = "acc_norm" if benchmark.normalised else "acc"
    by_definition: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_definition[DEFINITIONS[benchmark.kind].format(subject=sample.task)].append(sample)
    root = Path(definitions.__file__).parent
    files = {}
    for number, (definition, group) in enumerate(by_definition.items()):
        chosen = [rows[_row(sample)] for sample in group]
        files[f"rows_{number}"] = _write_task(benchmark.kind, chosen, root / definition, scratch, f"rows_{number}")
    loaded = definitions.TaskManager(include_defaults=False).load([str(file) for file in files.values()])
    language_model = HFLM(pretrained=str(model), dtype=dtype, device=device, batch_size=_BATCH)
    found = evaluate(language_model, loaded, bootstrap_iters=0)
    answered = {}
    for name, group in zip(files, by_definition.values(), strict=True):
        for logged in found["samples"][name]:
            sample = group[logged["doc_id"]]
            answered[_row(sample)] = Answered(
                _row(sample),
                tuple(_tokens(language_model, *pair) for pair in logged["arguments"]),
                tuple(float(response[0]) for response in logged["filtered_resps"]),
                float(logged[metric]),
            )
    return [answered[_row(sample)] for sample in samples]


def own_answers(
    benchmark: MultipleChoice,
    samples: Sequence[Sample],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationParams,
    advance: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """The same samples as the sweep answers them from the uncompressed cache; ``advance`` is called after each."""
    sweep = Sweep(model, tokenizer, {}, {}, evaluation, budgets=())
    answered = []
    for sample in samples:
        cache, rows = evict(sweep.prefill(sample, seed=0), {}, (), sweep.layout.windows, reserve(sample))
        (said,) = ask(sample, cache, rows, model, tokenizer, sweep.end_tokens)
        (outcome,) = benchmark.score(sample, Answer(nll=said.nll)).values()
        prompt = sample.input_ids[: sample.prompt_len]
        answered.append(
            Answered(
                _row(sample),
                tuple((*prompt, *choice) for choice in sample.choices),
                tuple(-value for value in said.nll),
                outcome,
            )
        )
        advance()
    return answered


def compare(harness: Sequence[Answered], ours: Sequence[Answered], tolerance: float) -> Agreement:
    """How far both agree, row by row; log-likelihoods up to ``tolerance`` nats."""
    pairs = list(zip(harness, ours, strict=True))
    differences = [
        max(abs(a - b) for a, b in zip(one.log_likelihoods, other.log_likelihoods, strict=True)) for one, other in pairs
    ]
    return Agreement(
        len(pairs),
        math.fsum(one.outcome for one in harness) / len(pairs),
        math.fsum(other.outcome for other in ours) / len(pairs),
        sum(one.input_ids == other.input_ids for one, other in pairs),
        sum(one.outcome == other.outcome for one, other in pairs),
        sum(difference <= tolerance for difference in differences),
        max(differences),
    )


def _tokens(language_model: Any, prompt: str, choice: str) -> tuple[int, ...]:
    before, after = language_model._encode_pair(prompt, choice)
    return (*before, *after)


def _row(sample: Sample) -> int:
    return int(json.loads(sample.meta)["row"])


def _write_task(kind: str, rows: Sequence[Row], definition: Path, scratch: Path, name: str) -> Path:
    """A definition that includes the harness's own and differs in where the rows are."""
    data = scratch / f"{name}.jsonl"
    write_text(data, "".join(json.dumps(harness_row(kind, row)) + "\n" for row in rows))
    splits = dict.fromkeys(_SPLITS, str(data.resolve()))
    content = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str((scratch / "cache").resolve())},
    }
    file = scratch / f"{name}.yaml"
    write_text(file, json.dumps(content))  # JSON is YAML
    return file
