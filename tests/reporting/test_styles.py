import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.params import Params, load_params
from pipeline.reporting.params import ShownAs
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Styles
from tests.reporting.synthetic import REPOSITORY

BENCHMARKS = {"ruler": ShownAs(title="RULER", letter="R"), "dialogues": ShownAs(title="Dialogues", letter="S")}


@pytest.fixture(scope="module")
def params() -> Params:
    """Of the default profile."""
    return load_params(REPOSITORY / "params.yaml")


@pytest.fixture(scope="module")
def styles(params: Params) -> Styles:
    return Styles.of(params)


def test_lines_can_be_told_apart(styles: Styles) -> None:
    series = [(policy, None) for policy in ("full", "oracle", "lagkv", "keydiff", "knorm", "streaming-llm", "random")]
    series += [("snapkv", None), ("tova", None)]
    trained = [(policy, name) for policy in ("kvp-exact", "kvp-rloo") for name in ("ruler", "dialogues")]
    looks = [styles.style(*pair) for pair in series] + [styles.style(*pair) for pair in trained]
    assert len({(look.colour, look.dashes, look.width) for look in looks}) == len(looks)
    assert len({look.label for look in looks}) == len(looks)
    assert {look.label for look in looks if look.dashes == "--"} == {"SnapKV", "TOVA"}


def test_the_default_profile_looks_as_it_always_did(styles: Styles) -> None:
    shown = {
        ("full", None): ("No eviction", "#444444", "-", 1.4, ""),
        ("oracle", None): ("Oracle", "#000000", ":", 1.8, ""),
        ("kvp-exact", "ruler"): ("KVP_R exact", "#0072B2", "-", 3.0, "o"),
        ("kvp-exact", "dialogues"): ("KVP_S exact", "#D55E00", "-", 3.0, "h"),
        ("kvp-rloo", "ruler"): ("KVP_R rloo", "#0072B2", "-", 1.2, "o"),
        ("kvp-rloo", "dialogues"): ("KVP_S rloo", "#D55E00", "-", 1.2, "h"),
        ("lagkv", None): ("LagKV", "#009E73", "-", 1.4, "s"),
        ("keydiff", None): ("KeyDiff", "#CC79A7", "-", 1.4, "D"),
        ("knorm", None): ("K-Norm", "#56B4E9", "-", 1.4, "^"),
        ("streaming-llm", None): ("StreamingLLM", "#E69F00", "-", 1.4, "v"),
        ("random", None): ("Random", "#999999", "-", 1.4, "x"),
        ("snapkv", None): ("SnapKV", "#6A3D9A", "--", 1.4, "P"),
        ("tova", None): ("TOVA", "#7A4B1E", "--", 1.4, "X"),
    }
    looks = {pair: styles.style(*pair) for pair in shown}
    assert {
        pair: (look.label, look.colour, look.dashes, look.width, look.marker) for pair, look in looks.items()
    } == shown
    assert styles.in_order(sorted(shown, key=str)) == list(shown)
    assert styles.of_kind("attention-based") == ["snapkv", "tova"]
    assert styles.reference == "kvp-exact"


@pytest.mark.parametrize(("policy", "trained_on"), [("h2o", None), ("kvp-exact", "oasst2"), ("kvp-exact", None)])
def test_an_unknown_policy_is_named_and_never_drawn(styles: Styles, policy: str, trained_on: str | None) -> None:
    name = f"{policy}@{trained_on}" if trained_on else policy
    message = f"name the policy {name}, which is not in params.yaml; known: full, oracle, kvp-exact@ruler, .* tova"
    with pytest.raises(PipelineError, match=message):
        styles.label(policy, trained_on)
    with pytest.raises(PipelineError, match=message):
        styles.in_order([("full", None), (policy, trained_on)])


def test_many_baselines_each_have_a_colour_and_a_marker_of_their_own() -> None:
    for count in (12, 40):
        names = [f"baseline-{number}" for number in range(count)]
        styles = Styles(("ruler", "dialogues"), ("exact", "rloo"), BENCHMARKS, dict.fromkeys(names, False), {})
        looks = [styles.style(name) for name in (*names, "full", "oracle")]
        looks += [styles.style("kvp-exact", name) for name in BENCHMARKS]
        assert len({(look.colour, look.marker) for look in looks}) == len(looks)
        if count == 12:
            assert len({look.colour for look in looks}) == len({look.marker for look in looks}) + 1 == len(looks)


def test_what_a_baseline_is_called_and_whether_it_is_dashed_is_said_of_it() -> None:
    styles = Styles((), (), {}, {"new": True, "plain": False}, {"plain": "Plain Title"})
    assert (styles.label("new"), styles.style("new").dashes) == ("new", "--")
    assert (styles.label("plain"), styles.style("plain").dashes) == ("Plain Title", "-")


def test_the_exact_policy_comes_first_and_a_letter_belongs_to_one_benchmark(params: Params) -> None:
    matrix = params.matrix.model_copy(
        update={"trained_on": ("oasst2", "dialogues", "mmlu"), "estimator": ("rloo", "exact", "soft_rank")}
    )
    styles = Styles.of(replace(params, matrix=matrix))
    assert styles.estimators == ("exact", "rloo", "soft_rank")
    trained = ("oasst2", "dialogues", "mmlu")
    looks = [styles.style(f"kvp-{estimator}", name) for estimator in styles.estimators for name in trained]
    assert [look.label for look in looks[:3]] == ["KVP_S exact", "KVP_dialogues exact", "KVP_mmlu exact"]
    assert len({(look.colour, look.width) for look in looks}) == len(looks)
    assert looks[0].colour == "#D55E00"


def test_tasks_stand_in_the_order_of_their_benchmark(finished: tuple[Path, Run]) -> None:
    _, run = finished
    tasks = ["zebra", "qa_1", "vt", "niah_single_2", "apple"]
    assert run.in_order("ruler", tasks) == ["niah_single_2", "vt", "qa_1", "apple", "zebra"]
    assert run.in_order("dialogues", tasks) == sorted(tasks)


def test_reporting_imports_neither_torch_nor_what_it_shows() -> None:
    modules = sorted(
        f"pipeline.reporting.{path.stem}" for path in (REPOSITORY / "pipeline/reporting").glob("[a-z]*.py")
    )
    never = ("torch", "pipeline.params", "pipeline.evaluation", "pipeline.benchmarks", "pipeline.models")
    code = f"import sys, {', '.join(modules)}; print([name for name in {never} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
