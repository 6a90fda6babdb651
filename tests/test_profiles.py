"""Every profile is a complete, valid params file, and params.yaml is one of them."""

from pathlib import Path

import pytest

from pipeline.params import load_params

REPOSITORY = Path(__file__).parent.parent
PROFILES = sorted((REPOSITORY / "profiles").glob("*.yaml"))


def test_the_profiles_that_others_rely_on_exist() -> None:
    assert {"default", "ci"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_validates_and_carries_its_name(path: Path) -> None:
    assert load_params(path).profile == path.stem


def test_params_yaml_is_the_profile_it_names() -> None:
    path = REPOSITORY / "params.yaml"
    profile = REPOSITORY / "profiles" / f"{load_params(path).profile}.yaml"
    assert path.read_text() == profile.read_text()
