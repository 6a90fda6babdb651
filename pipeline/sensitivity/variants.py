"""What the sensitivity study trains: one thing of its base variant changed at a time. It trains nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from pipeline.params import SensitivityParams, TrainParams
from pipeline.policy.train import Estimator

# The variant that all others are compared with.
BASE = ("estimator", "exact")
# What ends the value of a variant whose agents see no position.
NO_POSITION = ", no position"


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
            "estimator": self.estimator,
            "params": self.params.model_dump(mode="json"),
            "fraction": self.fraction,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Variant:
    """One value of one axis. Several variants may share a training: every axis passes through the base."""

    axis: str
    value: str
    training: Training


def variants(train: TrainParams, sensitivity: SensitivityParams, seed: int) -> list[Variant]:
    """The study's variants for one seed, axis by axis.

    ``inputs`` is crossed with the position features on and off, ``estimator`` with the learning rates, which it names
    where they are not the base's. Only the estimators are validated during training, the others at its ends.
    """
    base = _shortened(train, sensitivity.base_steps).model_copy(update={"seed": seed})

    def changed(update: Mapping[str, object], fraction: float = 1.0) -> Training:
        params = base.model_copy(update=update)
        if params == base and fraction == 1:
            return Training("exact", base)
        return Training("exact", params.model_copy(update={"validate_every": params.steps}), fraction)

    def agent(**update: object) -> Training:
        return changed({"agent": base.agent.model_copy(update=update)})

    found = [
        Variant("training_fraction", f"{fraction:g}", changed({}, fraction))
        for fraction in sensitivity.training_fraction
    ]
    for steps in sensitivity.steps:
        schedule = _shortened(train, steps)
        update = {"steps": steps, "warmup_steps": schedule.warmup_steps}
        found.append(Variant("steps", str(steps), changed(update)))
    found += [Variant("hidden_width", str(width), agent(hidden_width=width)) for width in sensitivity.hidden_width]
    for inputs in sensitivity.inputs:
        found.append(Variant("inputs", inputs, agent(inputs=inputs)))
        found.append(Variant("inputs", inputs + NO_POSITION, agent(inputs=inputs, position_features=())))
    for estimator in get_args(Estimator):
        for factor in dict.fromkeys((1.0, *sensitivity.rate_factor)):
            rates = {name: factor * getattr(base, name) for name in ("learning_rate", "final_learning_rate")}
            value = estimator if factor == 1 else f"{estimator} {rates['learning_rate']:g}"
            found.append(Variant("estimator", value, Training(estimator, base.model_copy(update=rates))))
    return found


def _shortened(train: TrainParams, steps: int) -> TrainParams:
    """The same schedule in another number of steps, validated as many times."""
    warmup, every = (round(value * steps / train.steps) for value in (train.warmup_steps, train.validate_every))
    return train.model_copy(update={"steps": steps, "warmup_steps": warmup, "validate_every": max(1, every)})
