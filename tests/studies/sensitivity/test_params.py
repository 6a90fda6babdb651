"""The study's section of studies/params.yaml: what it may say, alone and beside params.yaml."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.params import Params, check_params
from pipeline.profiles import known_profiles, render
from pipeline.section import parse_text
from studies.sensitivity.params import StudySensitivity, read_study, titles, training_length
from tests.studies.sensitivity.conftest import STUDY

PROFILES = Path(__file__).parents[3] / "profiles"
Edit = Callable[[dict[str, Any]], None]


def params_of(profile: str, edit: Edit = lambda _: None) -> Params:
    tree = parse_text(render(profile, PROFILES).params)
    edit(tree)
    return check_params(tree)


def read_changed(directory: Path, key: str, value: Any, params: Params) -> StudySensitivity:
    """The study of the ci profile with one value changed."""
    content = YAML(typ="safe").load(render("ci", PROFILES).studies)
    *places, last = key.split(".")
    node = content["sensitivity"]
    for place in places:
        node = node[place]
    node[last] = value
    stream = io.StringIO()
    YAML(typ="safe").dump(content, stream)
    (directory / "params.yaml").write_text(stream.getvalue())
    return read_study(params, directory / "params.yaml")


@pytest.mark.parametrize("profile", known_profiles(PROFILES))
def test_every_profile_holds_a_study_that_fits_it(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(render(profile, PROFILES).studies)
    assert read_study(params_of(profile), path).seeds >= 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seeds", 1, "sensitivity.seeds: .*greater than or equal to 2"),
        ("training_fraction", [1.5], "sensitivity.training_fraction.0: "),
        ("inputs", ["queries"], r"sensitivity.inputs.0: .*\(got 'queries'\)"),
        ("steps", [12, 12], "sensitivity: steps names a value twice"),
        ("stpes", [12], "unknown key sensitivity.stpes"),
        (
            "longer",
            {"dialogues": {"length": 1024, "samples": 1}},
            "sensitivity.longer names 'dialogues', which is no RULER benchmark in matrix.trained_on",
        ),
        ("longer.ruler.length", 512, "sensitivity.longer.ruler: length 512 is not above that of the benchmark"),
    ],
)
def test_what_a_study_cannot_be_is_one_sentence(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        read_changed(tmp_path, key, value, params_of("ci"))
    assert str(tmp_path / "params.yaml") in str(caught.value)


def test_a_ruler_that_is_not_trained_on_has_no_longer_sequences(tmp_path: Path) -> None:
    def drop(tree: dict[str, Any]) -> None:
        tree["matrix"]["trained_on"] = ("dialogues",)

    with pytest.raises(PipelineError, match=r"longer names 'ruler', which is no RULER benchmark in matrix\.trained_on"):
        read_changed(tmp_path, "seeds", 2, params_of("ci", drop))


def test_a_study_without_its_base_variants_estimator_is_refused(tmp_path: Path) -> None:
    def drop(tree: dict[str, Any]) -> None:
        del tree["estimators"]["exact"]
        tree["matrix"]["estimator"] = ("rloo",)

    with pytest.raises(PipelineError, match="its base variant needs the estimator 'exact'"):
        read_changed(tmp_path, "seeds", 2, params_of("ci", drop))


def test_hidden_states_are_an_input_of_the_study_only() -> None:
    def see_hidden(tree: dict[str, Any]) -> None:
        tree["train"]["agent"]["inputs"] = ("hidden",)

    assert "hidden" in STUDY.inputs
    with pytest.raises(
        PipelineError, match=r"train\.agent\.inputs names 'hidden', but .* only sensitivity\.inputs may"
    ):
        params_of("ci", see_hidden)


def test_lengths_and_titles_are_those_of_the_benchmarks() -> None:
    params = params_of("default")
    assert (training_length(params, "ruler"), training_length(params, "dialogues")) == (1024, 1024)
    assert titles(params)["dialogues"] == "Doc2Dial dialogues"

    def alike(tree: dict[str, Any]) -> None:
        tree["benchmarks"]["mmlu"]["shown"]["title"] = "RULER"

    assert titles(params_of("default", alike))["ruler"] == "RULER (ruler)"
