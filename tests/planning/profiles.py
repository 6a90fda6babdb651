"""The profiles as params, without a params.yaml."""

from pathlib import Path

from pipeline.params import Params, check_params
from pipeline.profiles import known_profiles, render
from pipeline.section import parse_text

REPOSITORY = Path(__file__).parents[2]
NAMES = known_profiles(REPOSITORY / "profiles")


def read_profile(name: str) -> Params:
    return check_params(parse_text(render(name, REPOSITORY / "profiles").params))
