"""The plan as a whole: every stage of every profile, sums, and what is assumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.params import load_params
from pipeline.planning.plan import SampleGroup, make_plan, paper_training, sample_groups
from pipeline.planning.table import print_plan

REPOSITORY = Path(__file__).parents[2]
PROFILES = sorted((REPOSITORY / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_every_entry_of_every_stage_is_planned(path: Path, device: str, tmp_path: Path) -> None:
    params = load_params(path)
    plan = make_plan(params, device, tmp_path)
    matrix = params.matrix
    models, corpora, benchmarks = len(matrix.model), len(matrix.corpus), len(matrix.benchmark)
    expected = {
        "model": models,
        "check": models,
        "samples": models * benchmarks,
        "traces": models * corpora,
        "train": models * corpora * len(matrix.estimator),
        "evaluate": models * benchmarks,
        "examples": models * corpora,
    }
    planned = [stage.stage for stage in plan.stages]
    assert {name: planned.count(name) for name in expected} == expected
    assert len(planned) == sum(expected.values())
    assert all(stage.seconds > 0 and stage.disk > 0 and stage.host_memory > 0 for stage in plan.stages)
    # Whatever is no device of its own has no memory of its own.
    assert (plan.total["device_memory"] > 0) == (device == "h100")
    assert plan.total["seconds"] == pytest.approx(sum(stage.seconds for stage in plan.stages))
    assert plan.total["host_memory"] == max(stage.host_memory for stage in plan.stages)


def test_the_stages_are_those_of_dvc_yaml() -> None:
    plan = make_plan(load_params(REPOSITORY / "params.yaml"), "cpu", Path("nowhere"))
    stages = list(YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"])
    assert (
        list(dict.fromkeys(stage.stage for stage in plan.stages))
        == stages[stages.index("model") : stages.index("results")]
    )


def test_samples_are_counted_per_task_and_split() -> None:
    corpora = load_params(REPOSITORY / "profiles/default.yaml").corpora
    ruler, dialogues = corpora["ruler"], corpora["dialogues"]
    short, long = sample_groups(ruler)
    sizes = ruler.samples
    # Two of thirteen tasks have a length of their own.
    assert (short.train, short.validation, short.test) == (11 * sizes.train, 11 * sizes.validation, 11 * sizes.test)
    assert (long.train, long.validation, long.test) == (2 * sizes.train, 2 * sizes.validation, 2 * sizes.test)
    assert long.tokens - short.tokens == 1792 - 1024
    (group,) = sample_groups(dialogues)
    assert (group.train, group.validation, group.test) == tuple(dialogues.samples.model_dump().values())
    assert (group.tokens, group.new_tokens) == (1024, 0)


def test_a_kind_without_a_function_is_planned_by_what_it_has() -> None:
    corpora = load_params(REPOSITORY / "profiles/local-data.yaml").corpora
    assert sample_groups(corpora["longbench"]) == [SampleGroup(0, 0, 14, 1024, 32, 32, scored=False)]
    (short,) = sample_groups(corpora["boolq"])
    assert (short.train, short.validation, short.test, short.new_tokens) == (0, 0, 40, 0)
    unheard_of = SimpleNamespace(kind="unheard-of", samples=SimpleNamespace(test=7))
    assert [group.test for group in sample_groups(unheard_of)] == [7]  # type: ignore[arg-type]


def test_a_device_without_rates_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"--device tpu has no rates in the plan; choose cpu or one of .*h100\.$"):
        make_plan(load_params(PROFILES[0]), "tpu", tmp_path)


def test_the_paper_s_training_is_counted_by_hand() -> None:
    paper = paper_training()
    # Forward 2 per weight, gradients of weights 2, of hidden units 2 but for the first layer's input.
    weights, first = 257 * 256 + 256 * 256 + 256, 257 * 256
    assert paper["agents"] == 112
    assert paper["parameters_per_agent"] == 132_097
    assert paper["whole_sequence_flops"] == 112 * 4000 * 4500 * (6 * weights - 2 * first)
    # 4,500 tokens are cut at 64, 128, ..., 4,480.
    sizes = range(64, 4500, 64)
    assert paper["drawn_cache_flops"] == pytest.approx(paper["whole_sequence_flops"] * sum(sizes) / len(sizes) / 4500)


def test_json_holds_what_the_table_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_params(REPOSITORY / "profiles/paper-qwen2.5-7b.yaml"), "h100", Path("nowhere"))
    content = json.loads(json.dumps(plan.as_json()))
    assert content["total"] == plan.total
    assert len(content["stages"]) == len(plan.stages)
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(plan)
    shown = capsys.readouterr().out
    assert "paper-qwen2.5-7b on h100" in shown
    assert "evicted caches of" in shown
    assert "112 agents for 4,000 steps" in shown
    for assumption in plan.assumptions:
        assert " ".join(assumption.split())[:60] in " ".join(shown.split())
