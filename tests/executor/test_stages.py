"""The stages' own jobs on two machines, one of which goes: the files of the local run."""

import copy
import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.closure import ROOT, Code
from pipeline.evaluation.job import SweepJob
from pipeline.evaluation.selfcheck import check_model
from pipeline.eviction.baselines.base import Baseline
from pipeline.eviction.budget import AtBenchmark, EvaluationParams
from pipeline.executor.units import LOCAL, run_units
from pipeline.files import write_json
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from pipeline.samples.sample import Sample, write_samples
from pipeline.tables import PolicyKey
from tests.conftest import MakeModel
from tests.executor.conftest import Machines, Start, files, finish
from tests.executor.jobs import Behind, until

CONTEXT = 60
SAMPLES = 4


def write_model(folder: Path, make_model: MakeModel) -> None:
    """A tiny model with a tokenizer of a word for each token, and what the check stage says of it."""
    make_model("llama").save_pretrained(folder / "model")
    verdict = check_model(copy.deepcopy(make_model("llama")), "tiny", "float32")
    write_json(folder / "check.json", verdict.model_dump(mode="json"))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 128)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    tokenizer.save_pretrained(folder / "model")


def sample(number: int) -> Sample:
    ids = (torch.arange(CONTEXT + 6) * (37 + 2 * number) % 125 + 3).tolist()
    asked = ("likelihood", "text")
    return Sample(f"s{number}", "ruler", "vt", "test", tuple(ids), CONTEXT, None, ("w9",), 4, "{}", asked)


def test_an_evaluation_whose_machine_dies(
    make_model: MakeModel, machines: Machines, start: Start, folder: Path
) -> None:
    write_model(folder, make_model)
    write_samples(folder / "test.parquet", [sample(number) for number in range(SAMPLES)])
    shape = PolicyShape(3, 2, 16, AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age")))
    save_policy(folder / "policy", Policy(shape, torch.Generator().manual_seed(1)), {"model": "tiny"})
    job = SweepJob(
        name="evaluate tiny ruler",
        directory=folder / "local",
        code=Code(str(ROOT / "stages/evaluate.py")),
        device="cpu",
        model="tiny",
        dtype="float32",
        weights=folder / "model",
        verdict=folder / "check.json",
        test=folder / "test.parquet",
        policies={PolicyKey("kvp-exact", "ruler"): folder / "policy"},
        baselines={"random": Baseline(own="random", sees_attention=False)},
        evaluation=EvaluationParams(budgets=(24, 48), n_sink=4, n_recent=16, seed=0),
        here=AtBenchmark(budgets=None, shorter="refuse"),
    )
    run_units(job, job.units(), LOCAL, lambda count=1, status="": None)
    job.gather()
    expected = files(folder / "local")
    assert len(expected) == 2 * SAMPLES + 2

    spread = dataclasses.replace(job, directory=folder / "ray")
    behind = Behind(spread, folder / "doors", shut=("00002", "00003"), step=0)
    process = start(behind)
    until(lambda: len(behind.came()) == SAMPLES, "the last two samples", process)
    machines.kill()
    (folder / "doors/open").touch()
    lines = finish(process)
    spread.gather()
    assert files(folder / "ray") == expected
    assert sum("a worker died in unit" in line for line in lines) == 1
    assert sorted(map(len, behind.came().values())) == [1, 1, 1, 2]
