"""What the sensitivity study trains: one thing of its base variant changed at a time. It trains nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.policy.agents import AgentParams
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.train import TrainParams
from studies.sensitivity.columns import BASE, NO_POSITION
from studies.sensitivity.params import Inputs, StudySensitivity

# The inputs of an agent (pipeline/policy/inputs) that each value of the axis of inputs stands for.
SEEN: Mapping[Inputs, tuple[str, ...]] = {
    "keys": ("key",),
    "values": ("value",),
    "both": ("key", "value"),
    "hidden": ("hidden",),
}


@dataclass(frozen=True)
class Training:
    """Everything that decides a training besides the traces. ``fraction`` is of the training sequences."""

    estimator: Estimator
    params: TrainParams
    fraction: float = 1.0

    @property
    def fingerprint(self) -> str:
        """Hash of the fields, which names the files of this training."""
        fields = {
            "estimator": self.estimator.name,
            "estimator_params": self.estimator.model_dump(mode="json"),
            "params": self.params.model_dump(mode="json"),
            "fraction": self.fraction,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def sees_hidden(self) -> bool:
        """Whether its agents see what no cache holds."""
        return not all(entry.cached for entry in self.params.agent.seen)


@dataclass(frozen=True)
class Variant:
    """One value of one axis. Several variants may share a training: every axis passes through the base."""

    axis: str
    value: str
    training: Training


def variants(
    train: TrainParams, estimators: Mapping[str, Estimator], study: StudySensitivity, seed: int
) -> list[Variant]:
    """The study's variants for one seed, axis by axis.

    ``inputs`` is crossed with the positions on and off, ``estimator`` with the learning rates, which it names where
    they are not the base's. Only the estimators are validated during training, the others at its ends.

    Parameters
    ----------
    estimators
        All of params.yaml, by name; ``exact`` is among them.
    """
    exact = estimators[BASE[1]]
    base = _shortened(train, study.base_steps).model_copy(update={"seed": seed})

    def changed(update: Mapping[str, object], fraction: float = 1.0) -> Training:
        params = base.model_copy(update=update)
        if params == base and fraction == 1:
            return Training(exact, base)
        return Training(exact, params.model_copy(update={"validate_every": params.steps}), fraction)

    def agent(**update: object) -> Training:
        return changed({"agent": base.agent.model_copy(update=update)})

    found = [
        Variant("training_fraction", f"{fraction:g}", changed({}, fraction)) for fraction in study.training_fraction
    ]
    for steps in study.steps:
        schedule = _shortened(train, steps)
        update = {"steps": steps, "warmup_steps": schedule.warmup_steps}
        found.append(Variant("steps", str(steps), changed(update)))
    found += [Variant("hidden_width", str(width), agent(hidden_width=width)) for width in study.hidden_width]
    for inputs in study.inputs:
        found.append(Variant("inputs", inputs, agent(inputs=_with_positions(SEEN[inputs], base.agent))))
        found.append(Variant("inputs", inputs + NO_POSITION, agent(inputs=SEEN[inputs])))
    for name, estimator in estimators.items():
        for factor in dict.fromkeys((1.0, *study.rate_factor)):
            rates = {rate: factor * getattr(base, rate) for rate in ("learning_rate", "final_learning_rate")}
            value = name if factor == 1 else f"{name} {rates['learning_rate']:g}"
            found.append(Variant("estimator", value, Training(estimator, base.model_copy(update=rates))))
    return found


def _with_positions(seen: tuple[str, ...], base: AgentParams) -> tuple[str, ...]:
    """What the base sees besides keys and values, behind ``seen``; the base's own inputs in their own order."""
    inputs = (*seen, *(name for name in base.inputs if name not in SEEN["both"]))
    return base.inputs if set(inputs) == set(base.inputs) else inputs


def _shortened(train: TrainParams, steps: int) -> TrainParams:
    """The same schedule in another number of steps, validated as many times."""
    warmup, every = (round(value * steps / train.steps) for value in (train.warmup_steps, train.validate_every))
    return train.model_copy(update={"steps": steps, "warmup_steps": warmup, "validate_every": max(1, every)})
