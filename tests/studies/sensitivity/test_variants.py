"""What each variant changes, and that it changes nothing else."""

from typing import Any

from pipeline.policy.train import learning_rate
from studies.sensitivity.columns import BASE
from studies.sensitivity.variants import Training, variants
from tests.studies.sensitivity.conftest import ESTIMATORS, STUDY, TRAIN

# Half the steps of the train section, so half of what is counted in steps.
BASE_PARAMS = TRAIN.model_copy(update={"steps": 60, "warmup_steps": 6, "validate_every": 20})


def by_name(seed: int = 3) -> dict[tuple[str, str], Training]:
    return {(variant.axis, variant.value): variant.training for variant in variants(TRAIN, ESTIMATORS, STUDY, seed)}


def changes(training: Training) -> dict[str, Any]:
    """Fields in which a training differs from the base."""
    ours, base = training.params.model_dump(), BASE_PARAMS.model_dump()
    found = {name: value for name, value in ours.items() if name != "agent" and value != base[name]}
    found |= {name: value for name, value in ours["agent"].items() if value != base["agent"][name]}
    if training.fraction != 1:
        found["fraction"] = training.fraction
    if training.estimator != ESTIMATORS["exact"]:
        found["estimator"] = training.estimator.name
    return found


def test_every_variant_changes_one_thing() -> None:
    # validate_every is the number of steps where no curve is drawn; it changes no policy.
    quiet = {"validate_every": 60}
    fast = {"learning_rate": 0.1, "final_learning_rate": 1e-3}
    assert {name: changes(training) for name, training in by_name().items()} == {
        ("training_fraction", "0.5"): {"fraction": 0.5} | quiet,
        ("training_fraction", "1"): {},
        ("steps", "30"): {"steps": 30, "warmup_steps": 3, "validate_every": 30},
        ("steps", "60"): {},
        ("hidden_width", "4"): {"hidden_width": 4} | quiet,
        ("hidden_width", "16"): {},
        ("inputs", "keys"): {"inputs": ("key", "position")} | quiet,
        ("inputs", "keys, no position"): {"inputs": ("key",)} | quiet,
        ("inputs", "values"): {"inputs": ("value", "position")} | quiet,
        ("inputs", "values, no position"): {"inputs": ("value",)} | quiet,
        ("inputs", "hidden"): {"inputs": ("hidden", "position")} | quiet,
        ("inputs", "hidden, no position"): {"inputs": ("hidden",)} | quiet,
        ("inputs", "both"): {},
        ("inputs", "both, no position"): {"inputs": ("key", "value")} | quiet,
        ("estimator", "exact"): {},
        ("estimator", "rloo"): {"estimator": "rloo"},
        ("estimator", "soft_rank"): {"estimator": "soft_rank"},
        ("estimator", "exact 0.1"): fast,
        ("estimator", "rloo 0.1"): fast | {"estimator": "rloo"},
        ("estimator", "soft_rank 0.1"): fast | {"estimator": "soft_rank"},
    }


def test_the_base_is_a_short_train_section_and_is_trained_once() -> None:
    found = by_name()
    base = found[BASE]
    assert base == Training(ESTIMATORS["exact"], BASE_PARAMS)
    shared = [name for name, training in found.items() if training == base]
    assert {axis for axis, _ in shared} == {"training_fraction", "steps", "hidden_width", "inputs", "estimator"}
    assert {training.fingerprint for training in found.values() if training != base}.isdisjoint({base.fingerprint})
    assert len({training.fingerprint for training in found.values()}) == len(set(found.values())) == 16


def test_a_shorter_schedule_is_the_same_curve_in_fewer_steps() -> None:
    short = by_name()["steps", "30"].params
    for step in range(30):
        assert abs(learning_rate(step, short) - learning_rate(4 * step, TRAIN)) < 1e-12


def test_seeds_differ_in_the_seed_only() -> None:
    for name, training in by_name(4).items():
        assert training.params.seed == 4
        assert training.params.model_copy(update={"seed": 3}) == by_name()[name].params
        assert training.fingerprint != by_name()[name].fingerprint


def test_the_order_of_the_inputs_makes_no_other_training() -> None:
    agent = TRAIN.agent.model_copy(update={"inputs": ("position", "value", "key")})
    train = TRAIN.model_copy(update={"agent": agent})
    found = {(v.axis, v.value): v.training for v in variants(train, ESTIMATORS, STUDY, 3)}
    assert found["inputs", "both"] == found[BASE]
    assert found["inputs", "keys"].params.agent.inputs == ("key", "position")


def test_only_hidden_states_are_seen_in_place_of_a_cache() -> None:
    assert {value for (_, value), training in by_name().items() if training.sees_hidden} == {
        "hidden",
        "hidden, no position",
    }
