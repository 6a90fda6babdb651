"""The whole pipeline on every profile that needs the hub, with sources and sizes replaced (``sizes.py``).

The models are tiny and random, and their numbers mean nothing: what is rehearsed is that every stage takes what the
one before it gives, with the params.yaml and the files that a run of days would have.
"""

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.params import Params, check_params
from pipeline.profiles import known_profiles
from tests.rehearsal import hub
from tests.rehearsal.models import KV_HEADS, LAYERS
from tests.rehearsal.project import environment, fill_hub, hub_repositories, make_project, profile_params, write_params
from tests.rehearsal.sizes import reduced
from tests.rehearsal.starter import started
from tests.test_pipeline import REPOSITORY, UP_TO_DATE, stages_run

pytestmark = pytest.mark.slow

ESSAYS = "long_context_eval/data/synthetic/json/PaulGrahamEssays.json"
PROFILES = [name for name in known_profiles(REPOSITORY / "profiles") if hub_repositories(profile_params(name))]


@dataclass(frozen=True)
class Rehearsal:
    """A project whose hub is up, and what its ``dvc repro`` said."""

    directory: Path
    environment: dict[str, str]
    params: Params
    output: str

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return _call(self.directory, self.environment, *command)


def _call(directory: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("rehearsal")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def variables(space: Path, ruler_wheel: Path, splitter_wheel: Path) -> Iterator[dict[str, str]]:
    """The environment of the rehearsals: a hub that holds what all of them fetch, and stages that start at once."""
    assert splitter_wheel.is_dir()  # so that no two projects unpack it
    for name in PROFILES:
        fill_hub(profile_params(name), space / "hub", ruler_wheel / ESSAYS)
    with hub.served(space / "hub") as endpoint:
        found = environment(endpoint)
        with started(space / "python", found) as commands:
            yield found | {"PATH": f"{commands}:{found['PATH']}"}


@pytest.fixture(scope="module")
def runs(space: Path, variables: dict[str, str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """``dvc repro`` of every profile, all at once: each of them waits for one process after the other."""
    begun = {}
    for name in PROFILES:
        make_project(space / name, reduced(profile_params(name)))
        with (space / f"{name}.log").open("wb") as log:
            begun[name] = subprocess.Popen(
                ["dvc", "repro"], cwd=space / name, env=variables, stdout=log, stderr=subprocess.STDOUT
            )
    yield begun
    for process in begun.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=PROFILES)
def rehearsal(
    request: pytest.FixtureRequest, space: Path, variables: dict[str, str], runs: dict[str, subprocess.Popen[bytes]]
) -> Rehearsal:
    """A profile after ``dvc repro``."""
    name = request.param
    code = runs[name].wait()
    output = (space / f"{name}.log").read_text()
    assert code == 0, output[-4000:]
    return Rehearsal(space / name, variables, check_params(reduced(profile_params(name))), output)


def test_there_is_something_to_rehearse() -> None:
    assert {"paper-qwen2.5-7b", "paper-phi-4"} <= set(PROFILES)


def test_every_stage_ran_once(rehearsal: Rehearsal) -> None:
    matrix = rehearsal.params.matrix
    expected = {"sources", "results", "report"}
    for model in matrix.model:
        expected |= {f"{stage}@{model}" for stage in ("model", "check")}
        for name in matrix.benchmark:
            expected |= {f"{stage}@{model}-{name}" for stage in ("samples", "evaluate", "score")}
        for name in matrix.trained_on:
            expected |= {f"{stage}@{model}-{name}" for stage in ("traces", "texts")}
            expected |= {f"train@{model}-{name}-{estimator}" for estimator in matrix.estimator}
    assert stages_run(rehearsal.output) == expected
    assert "Traceback" not in rehearsal.output
    assert "Warning" not in rehearsal.output
    assert "it/s]" not in rehearsal.output  # no library's progress bar: the output is no terminal


def test_the_results_have_every_policy_task_and_budget(rehearsal: Rehearsal) -> None:
    params, matrix = rehearsal.params, rehearsal.params.matrix
    table = pl.read_parquet(rehearsal.directory / "results/evaluation.parquet")
    policies = {("oracle", None), *((name, None) for name in params.baselines)}
    policies |= {(f"kvp-{estimator}", name) for estimator in matrix.estimator for name in matrix.trained_on}
    assert set(table["benchmark"]) == set(matrix.benchmark)
    assert set(table["model"]) == set(matrix.model)
    assert table["value"].is_finite().all()
    assert not table.is_duplicated().any()
    for name in matrix.benchmark:
        found, samples = table.filter(benchmark=name), params.benchmarks[name].samples
        expected = {(*policy, budget) for policy in policies for budget in params.budgets(name)} | {
            ("full", None, None)
        }
        for metric in set(found["metric"]):
            for row in found.filter(metric=metric).partition_by("sample_id"):
                assert set(row.select("policy", "trained_on", "budget").iter_rows()) == expected, (name, metric)
        tasks = samples.tasks_of
        assert found["sample_id"].n_unique() == samples.sizes.test * max(len(tasks), 1)
        if tasks:
            assert set(found["task"]) == set(tasks)


def test_something_was_evicted_from_every_benchmark(rehearsal: Rehearsal) -> None:
    """Otherwise all policies would say the same, and nothing would have been rehearsed."""
    table = pl.read_parquet(rehearsal.directory / "results/evaluation.parquet")
    answers = [pl.read_parquet(path) for path in (rehearsal.directory / "answers").glob("*/*/answers.parquet")]
    assert len(answers) == table["benchmark"].n_unique()
    for found in answers:
        smallest = found.filter(pl.col("budget") == pl.col("budget").min())
        said = smallest.select(pl.col("text").fill_null(""), pl.col("nll").list.sum())
        assert said.n_unique() > 1, found["benchmark"][0]


def test_the_costs_have_every_head(rehearsal: Rehearsal) -> None:
    table = pl.read_parquet(rehearsal.directory / "results/cost.parquet")
    per_head = table.group_by("model", "layer", "kv_head").len()
    assert per_head["len"].n_unique() == 1
    assert per_head.height == LAYERS * KV_HEADS * len(rehearsal.params.matrix.model)


def test_the_report_shows_every_benchmark_and_policy(rehearsal: Rehearsal) -> None:
    page = (rehearsal.directory / "reports/index.html").read_text()
    params = rehearsal.params
    for title in (params.benchmarks[name].shown.title for name in params.matrix.benchmark):
        assert title in page
    for name in params.baselines:
        assert params.report.titles.get(name, name) in page
    for pattern in ("metrics/*.json", "plots/*.csv", "reports/figures/*.png", "policies/*/*/*/README.md"):
        assert list(rehearsal.directory.glob(pattern)), pattern


def test_what_comes_from_the_hub_is_recorded_with_its_revision(rehearsal: Rehearsal) -> None:
    params, directory = rehearsal.params, rehearsal.directory
    (model,) = params.matrix.model
    recorded = {params.models[model].source: json.loads((directory / "models" / model / "source.json").read_text())}
    for name in params.matrix.benchmark:
        record = json.loads((directory / "samples" / model / name / "source.json").read_text())
        recorded[params.benchmarks[name].samples.source] = record["source"]
    hub_sources = {name: source for name, source in recorded.items() if source["uri"].startswith("hub:")}
    assert len(hub_sources) > 1
    for name, source in hub_sources.items():
        pinned = params.sources[name]
        assert source == {"uri": pinned.uri, "licence": pinned.licence, "revision": pinned.revision}


def test_a_second_repro_runs_nothing(rehearsal: Rehearsal) -> None:
    assert stages_run(rehearsal.call("dvc", "repro").stdout) == set()
    assert UP_TO_DATE in rehearsal.call("dvc", "status").stdout


# -- what makes a rehearsal fail


@pytest.fixture(scope="module")
def broken(space: Path, variables: dict[str, str]) -> Rehearsal:
    """The first profile with its model, for changes that a later stage has to refuse."""
    params = reduced(profile_params(PROFILES[0]))
    directory = space / "broken"
    make_project(directory, params)
    (model,) = params["matrix"]["model"]
    done = _call(directory, variables, "dvc", "repro", f"model@{model}")
    assert done.returncode == 0, done.stdout[-4000:]
    return Rehearsal(directory, variables, check_params(params), done.stdout)


def refused(broken: Rehearsal, params: dict[str, Any], *command: str) -> str:
    """The one sentence that a command ends in with other params."""
    write_params(broken.directory, params)
    done = broken.call(*command)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    (sentence,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
    return sentence


def test_a_dot_in_the_name_of_a_model_is_refused_before_anything_runs(broken: Rehearsal) -> None:
    params = reduced(profile_params(PROFILES[0]))
    (model,) = params["matrix"]["model"]
    params["models"]["with.dot"] = params["models"].pop(model)
    params["matrix"]["model"] = ("with.dot",)
    assert "with.dot" in (sentence := refused(broken, params, "dvc", "repro"))
    assert "a name holds letters, digits, - and _ only" in sentence


def without_column(folder: Path, column: str) -> None:
    """Take a column from every table of a repository."""
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        if column in table.column_names:
            pq.write_table(table.drop_columns(column), path)
    for path in folder.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            rows = {name: archive.read(name).decode().splitlines() for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, lines in rows.items():
                less = [{key: value for key, value in json.loads(line).items() if key != column} for line in lines]
                archive.writestr(name, "".join(json.dumps(row) + "\n" for row in less))


COLUMNS = {
    "oasst2": (
        "parent_id",
        "data/train-00000-of-00001.parquet: some rows lack parent_id; the source must follow OASST2's",
    ),
    "boolq": ("passage", "validation-00000-of-00001.parquet, counted from 0: row 0 lacks the column 'passage'"),
    "arc_challenge": ("answerKey", "test-00000-of-00001.parquet, counted from 0: row 0 lacks the column 'answerKey'"),
    "mmlu": ("subject", "all/test-00000-of-00001.parquet, counted from 0: row 0 lacks the column 'subject'"),
    "hellaswag": (
        "endings",
        "data/validation-00000-of-00001.parquet, counted from 0: row 0 lacks the column 'endings'",
    ),
    "gov_report": ("answers", "gov_report.jsonl, line 1: row 0 of gov_report lacks the column 'answers'"),
}


@pytest.mark.parametrize("benchmark", COLUMNS)
def test_a_missing_column_is_named_with_its_file(benchmark: str, broken: Rehearsal, space: Path) -> None:
    params = reduced(profile_params(PROFILES[0]))
    (model,) = params["matrix"]["model"]
    source = params["benchmarks"][benchmark]["samples"]["source"]
    repository, revision = hub_repositories(params)[source]
    column, expected = COLUMNS[benchmark]
    other = hashlib.sha1(f"{benchmark} without {column}".encode()).hexdigest()
    whole, lacking = (hub.place(space / "hub", hub.DATASETS, repository, name) for name in (revision, other))
    shutil.copytree(whole, lacking)
    without_column(lacking, column)
    params["sources"][source]["revision"] = other
    write_params(broken.directory, params)
    assert broken.call("python", "-m", "stages.sources").returncode == 0
    sentence = refused(broken, params, "python", "-m", "stages.samples", "--model", model, "--benchmark", benchmark)
    assert repository.replace("/", "--") in sentence
    assert expected in sentence


def test_a_revision_that_the_hub_does_not_have_is_named(broken: Rehearsal) -> None:
    # Last, because DVC removes the model before it runs the stage anew.
    params = reduced(profile_params(PROFILES[0]))
    (model,) = params["matrix"]["model"]
    source = params["models"][model]["source"]
    params["sources"][source]["revision"] = "0" * 40
    sentence = refused(broken, params, "dvc", "repro")
    assert sentence == f"error: {params['sources'][source]['uri']} has no revision {'0' * 40}; correct it."
