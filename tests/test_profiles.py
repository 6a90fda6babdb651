"""Every profile is a complete, valid params file, and params.yaml is one of them."""

import shutil
from pathlib import Path

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

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


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_dvc_finds_every_key_that_its_stages_name(path: Path, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    for name in ("dvc.yaml", "studies/dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copy(path, tmp_path / "params.yaml")
    repo = Repo.init(str(tmp_path), no_scm=True)
    keys = []
    for stage in repo.index.stages:
        for dependency in stage.deps:
            # Of params.yaml: other files are made by stages.
            if isinstance(dependency, ParamsDependency) and dependency.fs_path == str(tmp_path / "params.yaml"):
                assert set(dependency.read_params()) == set(dependency.params), stage
                keys += dependency.params
    repo.close()
    assert {f"models.{name}.dtype" for name in load_params(path).matrix.model} <= set(keys)
    assert {f"corpora.{name}" for name in load_params(path).matrix.benchmark} <= set(keys)
