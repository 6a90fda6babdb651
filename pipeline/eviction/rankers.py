"""From the baselines of params.yaml to what ranks a cache: files of ours, or a press of kvpress that scores tokens."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError, one_line
from pipeline.eviction.baselines.base import OBSERVED_QUERIES, OWN, Baseline, LayerCache, press_scores
from pipeline.models.layers import ModelLayer
from pipeline.section import validate

# Tokens of the cache that presses are tried on; more than LagKV needs for two partitions.
_PROBE = 300


@dataclass(frozen=True)
class Ranker:
    """A baseline, ready to score; it is shown attention only where it is said to look at it."""

    name: str
    sees_attention: bool
    scores: Callable[[LayerCache], Tensor]

    def __call__(self, cache: LayerCache) -> Tensor:
        """(kv_heads, n) float32, higher = keep.

        Raises
        ------
        PipelineError
            The baseline cannot score what it is shown.
        """
        shown = cache if self.sees_attention else replace(cache, attention=None)
        try:
            scores = self.scores(shown)
        except PipelineError:
            raise
        except Exception as error:  # a press raises whatever it likes
            hint = "" if self.sees_attention else " without attention (sees_attention is false)"
            raise PipelineError(
                f"baselines.{self.name} cannot score a cache{hint} ({one_line(error)}); it may be meant for one budget "
                "alone, or for a part of a model that is not handed to it: drop it."
            ) from error
        if scores.shape != cache.keys.shape[:2]:
            raise PipelineError(
                f"baselines.{self.name} gives scores of shape {tuple(scores.shape)} for a cache of "
                f"{tuple(cache.keys.shape[:2])} KV heads and tokens; drop it."
            )
        return scores


def make_rankers(baselines: Mapping[str, Baseline]) -> dict[str, Ranker]:
    """A ranker for every baseline of params.yaml.

    Raises
    ------
    PipelineError
        kvpress has no such press, the press scores no tokens, or it or a file of ours takes no such options.
    """
    return {name: Ranker(name, found.sees_attention, _scorer(name, found)) for name, found in baselines.items()}


def _scorer(name: str, baseline: Baseline) -> Callable[[LayerCache], Tensor]:
    if baseline.own is not None:
        return validate(baseline.options, OWN.load(baseline.own), f"baselines.{name}.options").score
    press = _press(name, baseline)
    return lambda cache: press_scores(press, cache)


def _press(name: str, baseline: Baseline) -> Any:
    import kvpress

    kinds = {
        found: kind
        for found in dir(kvpress)
        if isinstance(kind := getattr(kvpress, found), type)
        and issubclass(kind, kvpress.ScorerPress)
        and kind is not kvpress.ScorerPress
    }
    if baseline.press not in kinds:
        raise PipelineError(
            f"baselines.{name}.press: kvpress has no '{baseline.press}' that scores tokens; it has {', '.join(kinds)}."
        )
    try:
        press = kinds[baseline.press](**baseline.options)
    except Exception as error:  # dataclasses and their own checks
        raise PipelineError(f"baselines.{name}.options do not fit {baseline.press} ({one_line(error)}).") from None
    if reason := _no_ranking(press, baseline.sees_attention):
        raise PipelineError(f"baselines.{name}: {baseline.press} {reason}; drop it.")
    return press


def _no_ranking(press: Any, sees_attention: bool) -> str | None:
    """Why a press has not one order of a cache for all budgets, which its scores alone would not show."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, _PROBE, 8, generator=generator) for _ in range(2))
    attention = torch.rand(4, _PROBE, _PROBE, generator=generator)
    found = []
    try:
        with torch.random.fork_rng(devices=()):
            for ratio, queries in ((0.25, OBSERVED_QUERIES), (0.75, OBSERVED_QUERIES), (0.25, _PROBE)):
                probed = copy.copy(press)
                probed.compression_ratio = ratio
                shown = attention[:, -queries:] if sees_attention else None
                found.append(press_scores(probed, LayerCache(ModelLayer(0), keys, values, shown, 0)))
    except Exception:  # whatever a press cannot score, the ranker says of the cache at hand
        return None
    one, other_ratio, all_queries = found
    if not torch.allclose(one, other_ratio):
        return "scores a cache otherwise for another compression ratio, or by chance"
    if not torch.allclose(one, all_queries):
        return f"looks at the attention of earlier queries than the last {OBSERVED_QUERIES}, which alone it is shown"
    return None
