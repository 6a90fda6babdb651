"""The worked examples of docs/EXTENDING.md: each is applied to a copy of the project and run there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.profiles import render

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "docs/EXTENDING.md").read_text()
DIFFS = dict(
    zip(
        ("benchmark", "baseline", "estimator", "input"),
        re.findall(r"^```diff\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL),
        strict=True,
    )
)

BENCHMARK = """
import json, sys
from pathlib import Path
from pipeline.benchmarks.base import Answer
from pipeline.benchmarks.base_making import make_samples
from pipeline.params import load_params

params = load_params()
piqa = params.benchmarks["piqa"].samples
samples, _ = make_samples(piqa, "piqa", Path(sys.argv[1]), params.benchmark_sources("piqa"), Path("work"))
assert len(samples["test"]) == 40, len(samples["test"])
for sample in samples["test"]:
    right = [5.0, 5.0]
    right[sample.gold] = 1.0
    assert piqa.score(sample, Answer(nll=right)) == {"accuracy": 1.0}
    assert piqa.score(sample, Answer(nll=[-value for value in right])) == {"accuracy": 0.0}
print(sorted({answer for sample in samples["test"] for answer in sample.answers})[0])
"""

BASELINE = """
import torch
from pipeline.eviction.baselines.base import LayerCache
from pipeline.eviction.rankers import make_rankers
from pipeline.params import load_params

keys, values = torch.randn(2, 3, 9, 4).unbind(0)
scores = make_rankers(load_params().baselines)["value-norm"](LayerCache(0, keys, values, None, 0))
torch.testing.assert_close(scores, values.abs().sum(-1))
print(tuple(scores.shape))
"""

TRAINING = """
import sys
from pathlib import Path
import polars as pl, torch
from pipeline.params import load_params
from pipeline.policy.train import describe, train_policy
from pipeline.traces.build import choose_tokens
from pipeline.traces.shards import ExampleInfo, ExampleReader, ShardWriter, TraceShape, write_manifest

shape = TraceShape("tiny", "ruler", (0, 1), kv_heads=2, head_dim=4)
draw = torch.Generator().manual_seed(0)
root, work = Path("tiny-traces"), Path("tiny-policy")
for split, count in (("train", 6), ("validation", 3)):
    with ShardWriter(root, split, 0, shape) as writer:
        for example in range(count):
            info = ExampleInfo(example, example, f"{split}{example}", 48)
            writer.examples.append(info)
            for layer in (0, 1):
                keys, values = torch.randn(2, 2, 48, 4, generator=draw)
                rows = choose_tokens(keys, values, torch.exp(2 * keys[..., 0]), None, draw, info.sample_id, layer)
                writer.write_layer(layer, info, rows)
write_manifest(root, shape, {"train": 1, "validation": 1})
work.mkdir()
params = load_params()
train = params.train.model_copy(update={
    "steps": 60, "learning_rate": 1e-2, "warmup_steps": 2,
    "agent": params.train.agent.model_copy(update={"hidden_width": 16}),
})
estimator = params.estimators[sys.argv[1]]
readers = [ExampleReader(root, split, 1 << 20) for split in ("train", "validation")]
train_policy(work, *readers, estimator, train, describe(train, readers[0], estimator), "cpu", lambda *_: None)
cost = pl.read_parquet(work / "curves.parquet").filter(metric="validation_cost").group_by("step").agg(
    pl.col("value").mean()).sort("step")["value"]
assert cost[-1] < 0.8 * cost[0], cost
print(cost[0], cost[-1])
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code and the parameters of the project."""
    directory = tmp_path / "copy"
    for name in ("pipeline", "profiles"):
        shutil.copytree(REPOSITORY / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The committed one, whatever profile this checkout runs at present.
    (directory / "params.yaml").write_text(render("default", directory / "profiles").params)
    return directory


def apply(copy: Path, name: str) -> None:
    done = subprocess.run(
        ["git", "apply", "-"], cwd=copy, input=DIFFS[name], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"docs/EXTENDING.md: the diff of the {name} no longer applies: {done.stderr}"


def run(copy: Path, program: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", DIFFS)
def test_an_example_touches_two_files_at_most(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "--numstat", "-"], cwd=tmp_path, input=DIFFS[name], text=True, capture_output=True, check=True
    )
    assert 1 <= len(done.stdout.splitlines()) <= 2


def test_the_benchmark(copy: Path, smollm2: Path) -> None:
    apply(copy, "benchmark")
    rows = [
        {
            "goal": f"To open jar {number},",
            "sol1": f"turn lid {number}.",
            "sol2": f"sing to lid {number}.",
            "label": number % 2,
        }
        for number in range(50)
    ]
    (copy / "data").mkdir()
    (copy / "data/piqa.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "lid" in run(copy, BENCHMARK, str(smollm2))


def test_the_baseline(copy: Path) -> None:
    apply(copy, "baseline")
    assert run(copy, BASELINE).strip() == "(3, 9)"


def test_the_estimator(copy: Path) -> None:
    apply(copy, "estimator")
    run(copy, TRAINING, "regression")


def test_the_input(copy: Path) -> None:
    apply(copy, "input")
    run(copy, TRAINING, "exact")
    config = json.loads((copy / "tiny-policy/config.json").read_text())
    assert config["agent"]["inputs"] == ["key", "value", "position", "age", "share"]


def test_an_entry_that_is_not_there_is_refused_with_those_that_are(copy: Path) -> None:
    # Only the lines of params.yaml, without the file.
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("position, age]", "position, age, share]"))
    program = "from pipeline.params import load_params\ntry: load_params()\nexcept Exception as error: print(error)"
    assert "known: age, hidden, key, position, value" in run(copy, program)
