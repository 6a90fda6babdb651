"""The plan as a whole: every stage of every profile, sums, and what is assumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from ruamel.yaml import YAML

from pipeline.benchmarks.base import Answer, Benchmark, Making, SampleGroup, Sizes
from pipeline.errors import PipelineError
from pipeline.params import load_params
from pipeline.planning.devices import DEVICES
from pipeline.planning.paper import paper_training
from pipeline.planning.plan import make_plan
from pipeline.planning.table import print_plan
from pipeline.samples.sample import Sample, Split
from stages.plan import main
from tests.planning.profiles import NAMES, REPOSITORY, read_profile


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_every_entry_of_every_stage_is_planned(name: str, device: str, tmp_path: Path) -> None:
    params = read_profile(name)
    plan = make_plan(params, device, tmp_path, tmp_path)
    matrix = params.matrix
    models, learned, benchmarks = len(matrix.model), len(matrix.trained_on), len(matrix.benchmark)
    expected = {
        "model": models,
        "check": models,
        "samples": models * benchmarks,
        "traces": models * learned,
        "train": models * learned * len(matrix.estimator),
        "evaluate": models * benchmarks,
        "score": models * benchmarks,
        "texts": models * learned,
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
    plan = make_plan(load_params(REPOSITORY / "params.yaml"), "cpu", Path("nowhere"), Path("nowhere"))
    stages = list(YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"])
    assert (
        list(dict.fromkeys(stage.stage for stage in plan.stages))
        == stages[stages.index("model") : stages.index("results")]
    )


def test_samples_are_counted_per_task_and_split() -> None:
    benchmarks = read_profile("default").benchmarks
    ruler, dialogues = benchmarks["ruler"].samples, benchmarks["dialogues"].samples
    short, long = ruler.expected()
    sizes = ruler.sizes
    # Two of thirteen tasks have a length of their own.
    assert (short.train, short.validation, short.test) == (11 * sizes.train, 11 * sizes.validation, 11 * sizes.test)
    assert (long.train, long.validation, long.test) == (2 * sizes.train, 2 * sizes.validation, 2 * sizes.test)
    assert long.tokens - short.tokens == 1792 - 1024
    (group,) = dialogues.expected()
    assert (group.train, group.validation, group.test) == tuple(dialogues.sizes.model_dump().values())
    assert (group.tokens, group.new_tokens) == (1024, 0)


class UnheardOf(Benchmark):
    kind: Literal["unheard-of"]

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        raise NotImplementedError

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        raise NotImplementedError


def test_a_kind_that_expects_nothing_is_planned_by_what_it_has() -> None:
    benchmarks = read_profile("local-data").benchmarks
    assert benchmarks["longbench"].samples.expected() == [SampleGroup(0, 0, 14, 1024, 32, 32, scored=False)]
    (short,) = benchmarks["boolq"].samples.expected()
    assert (short.train, short.validation, short.test, short.new_tokens) == (0, 0, 40, 0)
    unheard_of = UnheardOf(kind="unheard-of", source="any", sizes=Sizes(test=7), seed=0)
    assert [group.test for group in unheard_of.expected()] == [7]


@pytest.mark.parametrize("name", ["", "ci"])
def test_a_profile_is_planned_where_params_yaml_is_another(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    before = Path("params.yaml").read_text()
    main(profile=name, as_json=True)
    assert json.loads(capsys.readouterr().out)["profile"] == (name or load_params().profile)
    assert Path("params.yaml").read_text() == before


def test_an_unknown_profile_is_one_sentence() -> None:
    with pytest.raises(PipelineError, match=r"There is no profile nothing; there are .*paper-qwen2\.5-7b\.$"):
        main(profile="nothing")


def test_answers_take_more_room_where_more_is_asked(tmp_path: Path) -> None:
    def disk(stage: str, perplexity: bool) -> float:
        params = read_profile("ci")
        ruler = params.benchmarks["ruler"]
        asked = replace(ruler, samples=ruler.samples.model_copy(update={"perplexity": perplexity}))
        plan = make_plan(replace(params, benchmarks=params.benchmarks | {"ruler": asked}), "cpu", tmp_path, tmp_path)
        (found,) = (cost for cost in plan.stages if (cost.stage, cost.entry.split()[-1]) == (stage, "ruler"))
        return found.disk

    assert disk("score", True) == 2 * disk("score", False)
    assert disk("evaluate", True) > disk("evaluate", False)


def test_devices_share_whole_units(tmp_path: Path) -> None:
    def seconds(devices: int) -> dict[str, float]:
        plan = make_plan(read_profile("paper-qwen2.5-7b"), "h100", tmp_path, tmp_path, devices)
        return {f"{stage.stage} {stage.entry}": stage.seconds for stage in plan.stages}

    alone, shared, most = (seconds(devices) for devices in (1, 8, 10_000))
    plan = make_plan(read_profile("paper-qwen2.5-7b"), "h100", tmp_path, tmp_path)
    units = {f"{stage.stage} {stage.entry}": stage.units for stage in plan.stages}
    # 13 tasks of 460, 8 and 100 samples, 16 sequences in a shard; 28 layers, 4 in a unit.
    assert units["traces qwen2-5-7b ruler"] == 374 + 7
    assert units["train qwen2-5-7b ruler exact"] == 7
    assert units["evaluate qwen2-5-7b ruler"] == 1300
    serial = {f"{stage.stage} {stage.entry}": DEVICES["h100"].start + stage.commit for stage in plan.stages}
    for name, count in units.items():
        start = serial[name]
        assert most[name] <= shared[name] <= alone[name]
        if name.startswith("samples"):  # over the cores of the host
            assert shared[name] < alone[name] or not name.endswith("oasst2")
        elif count == 1:
            assert shared[name] == alone[name]
        else:
            share = -(-count // 8) / count
            assert shared[name] - start == pytest.approx(share * (alone[name] - start))


def test_no_device_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"--gpus 0: there must be one at least\.$"):
        make_plan(read_profile("default"), "h100", tmp_path, tmp_path, 0)


def test_disk_is_told_with_and_without_links(tmp_path: Path) -> None:
    total = make_plan(read_profile("ci"), "cpu", tmp_path, tmp_path).total
    assert total["disk_linked"] == total["disk"]
    assert total["disk_copied"] == 2 * total["disk"]
    assert total["commit"] == pytest.approx(total["disk"] / DEVICES["cpu-2-cores"].commit)


def test_a_device_without_rates_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"--device tpu has no rates in the plan; choose cpu or one of .*h100\.$"):
        make_plan(read_profile("default"), "tpu", tmp_path, tmp_path)


def test_the_paper_s_training_is_counted_by_hand() -> None:
    paper = paper_training()
    # Forward 2 per weight, gradients of weights 2, of hidden units 2 but for the first layer's input.
    weights, first = 257 * 256 + 256 * 256 + 256, 257 * 256
    assert paper["agents"] == 112
    assert paper["parameters_per_agent"] == 132_097
    assert paper["whole_sequence_flops"] == 112 * 4000 * 4500 * (6 * weights - 2 * first)
    assert paper["drawn_cache_flops"] == pytest.approx(paper["whole_sequence_flops"] / 2)
    # Keys and values of 2,250 tokens on average in float16, and little besides.
    assert paper["read_bytes"] == pytest.approx(4000 * 112 * 2250 * 4 * 128, rel=0.1)


def test_json_holds_what_the_table_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(read_profile("paper-qwen2.5-7b"), "h100", Path("nowhere"), Path("nowhere"))
    content = json.loads(json.dumps(plan.as_json()))
    assert content["total"] == plan.total
    assert len(content["stages"]) == len(plan.stages)
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(plan)
    shown = capsys.readouterr().out
    assert "paper-qwen2.5-7b on h100" in shown
    assert "evicted caches of" in shown
    assert "112 agents for 4,000 steps" in shown
    assert "flops.bfloat16" in shown
    assert "where it copies. Checksums and copies take" in shown
    assert set(plan.rates) == set(DEVICES["h100"].origins)
    for assumption in plan.assumptions:
        assert " ".join(assumption.split())[:60] in " ".join(shown.split())
