"""The stages' own jobs on two machines, one of which goes: the files of the local run."""

import copy
import dataclasses
from pathlib import Path

import polars as pl
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.closure import ROOT, Code
from pipeline.evaluation.job import SweepJob
from pipeline.evaluation.selfcheck import check_model
from pipeline.eviction.baselines.base import Baseline
from pipeline.eviction.budget import AtBenchmark, EvaluationParams
from pipeline.executor.units import LOCAL, run_units, unseen
from pipeline.files import write_json
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, load_policy, save_policy
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.job import TrainingJob
from pipeline.policy.train import TrainParams
from pipeline.samples.sample import Sample, Split, write_samples
from pipeline.tables import PolicyKey
from pipeline.traces.job import TracesJob
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import ExampleReader, TraceShape
from tests.conftest import MakeModel
from tests.executor.conftest import Machines, Start, files, finish
from tests.executor.jobs import Behind, until
from tests.ruler.scripts import MAKES, is_gone, job_of, write_wheel
from tests.traces.synthetic import random_cache, write_traces

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


def sample(number: int, split: Split = "test") -> Sample:
    ids = (torch.arange(CONTEXT + 6) * (37 + 2 * number) % 125 + 3).tolist()
    asked = ("likelihood", "text")
    return Sample(f"s{number}", "ruler", "vt", split, tuple(ids), CONTEXT, None, ("w9",), 4, "{}", asked)


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
    behind = with_a_death(job, ("00002", "00003"), 0, machines, start, folder)
    assert len(files(folder / "local")) == 2 * SAMPLES + 2
    assert sorted(map(len, behind.came().values())) == [1, 1, 1, 2]


def test_a_capture_whose_machine_dies(make_model: MakeModel, machines: Machines, start: Start, folder: Path) -> None:
    write_model(folder, make_model)
    counts = {"train": 3, "validation": 1}
    for split, count in counts.items():
        write_samples(folder / f"{split}.parquet", [sample(number, split) for number in range(count)])
    job = TracesJob(
        name="traces tiny ruler",
        directory=folder / "local",
        code=Code(str(ROOT / "stages/traces.py")),
        device="cpu",
        shape=TraceShape("tiny", "ruler", (0, 1, 2), kv_heads=2, head_dim=16),
        dtype="float32",
        weights=folder / "model",
        samples={split: folder / f"{split}.parquet" for split in counts},
        counts=counts,
        params=TracesParams(cuts=2, at_prompt_end=0.5, tokens=20, sequences_per_shard=1, seed=0),
    )
    assert list(job.units()) == ["train-00000", "train-00001", "train-00002", "validation-00000"]
    shut = ("train-00002", "validation-00000")
    with_a_death(job, shut, 0, machines, start, folder)
    assert len(ExampleReader(folder / "ray", "train", 0).examples) == 6


@pytest.mark.parametrize("estimator", [Exact(), Rloo(samples=3)], ids=lambda estimator: estimator.name)
def test_a_training_whose_machine_dies(estimator: Estimator, machines: Machines, start: Start, folder: Path) -> None:
    shape = TraceShape("tiny", "ruler", tuple(range(2, 12)), kv_heads=2, head_dim=4)
    splits = {split: [[random_cache(shape, 30, seed)]] * 3 for seed, split in enumerate(("train", "validation"))}
    write_traces(folder / "traces", shape, splits, tokens=12)
    params = TrainParams(
        agent=AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age")),
        steps=9,
        batch_size=2,
        learning_rate=1e-2,
        final_learning_rate=1e-3,
        warmup_steps=2,
        warmup_factor=0.1,
        gradient_clip=5.0,
        weight_decay=0.01,
        validate_every=4,
        checkpoint_every=2,
        seed=0,
    )
    job = TrainingJob(
        name="train tiny ruler",
        directory=folder / "local",
        code=Code(str(ROOT / "stages/train.py")),
        device="cpu",
        traces=folder / "traces",
        layer_numbers=shape.layer_numbers,
        estimator=estimator,
        params=params,
        cache_bytes=1 << 20,
        config={"model": "tiny"},
    )
    assert job.units() == {"layer-002": 9, "layer-006": 9, "layer-010": 9}
    # The last of its advances is the sixth step; two checkpoints lie behind it.
    with_a_death(job, ("layer-006", "layer-010"), 7, machines, start, folder)
    policy, _ = load_policy(folder / "ray/policy", "tiny")
    assert policy.shape.layers == 10
    curves = pl.read_parquet(folder / "ray/policy/curves.parquet")
    assert curves.select("layer", "kv_head").unique().height == 20
    assert curves.filter(metric="loss").height == 9 * 20
    # A layer trains as it does alone: its unit's file holds it.
    part, _ = load_policy(folder / "ray/layer-006", "tiny")
    for name, states in part.state_dict().items():
        assert torch.equal(policy.state_dict()[name][8:16], states)


# Says which group of processes it is in, waits at the door and draws its row.
BEHIND = """
import os, random, sys, time
open(f"{doors}/{{sys.argv[4]}}.{{os.getpgrp()}}", "w").close()
while not os.path.exists("{doors}/open"):
    time.sleep(0.02)
"""


def test_tasks_of_ruler_whose_machine_dies(machines: Machines, start: Start, folder: Path, smollm2: Path) -> None:
    doors = folder / "doors"

    def came() -> dict[str, list[int]]:
        """Task -> the groups of its scripts."""
        found: dict[str, list[int]] = {}
        for path in doors.glob("*.*"):
            found.setdefault(path.stem, []).append(int(path.suffix[1:]))
        return found

    script = BEHIND.format(doors=doors) + MAKES.replace("'2 + 2'", "str(random.Random(sys.argv[4]).random())")
    tasks = ("one", "two", "three")
    job = job_of(write_wheel(folder / "wheel", dict.fromkeys(tasks, script)), smollm2, folder / "local", *tasks)
    (doors / "open").touch()
    run_units(job, job.units(), LOCAL, unseen)
    for path in doors.iterdir():
        path.unlink()
    spread = dataclasses.replace(job, directory=folder / "ray")
    process = start(spread)
    until(lambda: len(came()) == 2, "two scripts", process)
    groups = [group for (group,) in came().values()]
    machines.kill()  # and with it one of the scripts, in the middle of its task
    until(lambda: any(map(is_gone, groups)), "the end of a script", process)
    (doors / "open").touch()
    lines = finish(process)
    assert spread.gather() == job.gather()
    assert len({row["input"] for (row,) in spread.gather().values()}) == 3
    assert files(folder / "ray/rows") == files(folder / "local/rows")
    assert sorted(map(len, came().values())) == [1, 1, 2]
    assert sum("a worker died in unit" in line for line in lines) == 1


def with_a_death(
    job: SweepJob | TracesJob | TrainingJob,
    shut: tuple[str, ...],
    step: int,
    machines: Machines,
    start: Start,
    folder: Path,
) -> Behind:
    """Do a job here, and on two machines of which one is taken away in a unit: the same files."""
    run_units(job, job.units(), LOCAL, unseen)
    job.gather()
    spread = dataclasses.replace(job, directory=folder / "ray")
    behind = Behind(spread, folder / "doors", shut=shut, step=step)
    process = start(behind)
    until(lambda: set(shut) <= set(behind.came()), "the last two units", process)
    waiting = [worker for unit in shut for worker in behind.came()[unit]]
    machines.kill()
    # A worker outlives its machine for a moment, in which it might do all that is left.
    until(lambda: not all(map(psutil.pid_exists, waiting)), "the end of a worker", process)
    (folder / "doors/open").touch()
    lines = finish(process)
    spread.gather()
    assert files(folder / "ray") == files(folder / "local")
    assert sum("a worker died in unit" in line for line in lines) == 1
    return behind
