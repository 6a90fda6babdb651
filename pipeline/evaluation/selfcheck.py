"""Does what we compute with a model equal what transformers computes with it? Tried before anything else is.

A few hundred tokens go through capture, eviction with a budget that keeps everything, and decoding, and through the
model's own forward in one call, with its eager attention, which is the family's definition of it. A model that passes
gives right numbers, one that does not is refused in a sentence; no list of families decides it. It reads no weights'
files (``pipeline/models/load.py`` holds them against the config) and knows no policy.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError, one_line
from pipeline.evaluation.decode import continuation_nll, greedy_decode
from pipeline.evaluation.evict import evict
from pipeline.evaluation.prefill import prefill_sample
from pipeline.evaluation.verdict import Verdict
from pipeline.models.attention import attention_function, attention_implementation
from pipeline.models.forward import run_model
from pipeline.models.layout import CacheLayout, cache_layout
from pipeline.samples.sample import Sample
from pipeline.traces.capture import ObservedLayer, Recorder, Tails, capture_attention, run_captured

# Largest difference allowed in float32: nats of a token, a weight of attention, or a part of the largest number of a
# layer's keys. Rounding stays a tenth of it or less; anything computed otherwise is far above it.
TOLERANCE = 1e-3
_CONTEXT, _CONTINUATION, _GREEDY, _ATTENTION = 160, 24, 16, 96
# Windows up to this are tried on texts that exceed them. Where a larger one ends is known from the model's mask.
_LARGEST_WINDOW = 1024
# Tokens on either side of a place at which positions may be computed in another way.
_AROUND = 24


def check_model(
    model: PreTrainedModel,
    name: str,
    dtype: str,
    tolerance: float = TOLERANCE,
    report: Callable[[str, float], None] = lambda what, difference: None,
) -> Verdict:
    """Hold our numbers against the model's own forward, then run it once in the dtype that will be used.

    Parameters
    ----------
    model
        In float32 (or float64). Afterwards it is in ``dtype``.
    dtype
        What traces and the sweep run it in; every logit, key, value and score must be finite there.
    report
        Called with what was compared and the largest difference.

    Raises
    ------
    PipelineError
        Names what differs, or what is not finite.
    """
    layout = cache_layout(model)

    def compare(what: str, difference: float, consequence: str) -> None:
        report(what, difference)
        # Negated, so that a NaN does not pass.
        if not difference <= tolerance:
            raise PipelineError(
                f"{name}: {what} differ from transformers' own by {difference:.2g}, where {tolerance:g} is allowed, so "
                f"{consequence} would be wrong; choose another model."
            )

    try:
        longest = None
        for place in reversed(_switches(model, layout)):
            difference = _switch_difference(model, layout, place)
            report(f"keys and values on both sides of {place} tokens", difference)
            longest = longest if difference <= tolerance else place
        window = max((window for window in layout.windows.values() if window <= _LARGEST_WINDOW), default=0)
        context = max(_CONTEXT, window + 2 * _AROUND)
        limit = min(tokens for tokens in (longest, layout.tokens, context + _CONTINUATION + _GREEDY) if tokens)
        context = limit - _CONTINUATION - _GREEDY
        if context < _AROUND:
            raise PipelineError(
                f"{name} reads {limit} tokens before its positions change or end, too few for any text; choose another "
                "model."
            )
        ids = _tokens(model, context + _CONTINUATION)
        nll, generated = _ours(model, ids, context)
        compare("likelihoods of a continuation", _largest(nll, _own_nll(model, ids, context)), "every score")
        compare("greedy tokens", _loss_of_greed(model, ids[:context], generated), "every text")
        compare("keys and values of a text cut into calls", _cut_difference(model, ids, context), "traces")
        compare("attention weights", _attention_difference(model, layout, ids[:_ATTENTION]), "importance")
        model.to(getattr(torch, dtype))
        _ours(model, ids, context)
    except PipelineError:
        raise
    except Exception as error:  # a family's own code: any class
        raise PipelineError(
            f"{name} cannot be run as the pipeline runs it ({one_line(error)}); choose another model."
        ) from error
    return Verdict(
        model=name,
        dtype=dtype,
        verdict="right",
        tolerance=tolerance,
        tokens=len(ids),
        longest=longest,
        reads=layout.tokens,
        vocabulary=model.config.get_text_config(decoder=True).vocab_size,
        ranked_layers=list(layout.ranked),
        windows={str(number): size for number, size in layout.windows.items()},
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
    )


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Random token ids, (count,) int64, behind the token that begins a text."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    first = getattr(config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < config.vocab_size:
        ids[0] = first
    return ids


def _ours(model: PreTrainedModel, ids: Tensor, context: int) -> tuple[Tensor, list[int]]:
    """Nats of each token behind the context, (t,) float32, and greedy tokens, by the sweep, keeping everything."""
    sample = Sample("check", "check", "check", "test", tuple(ids.tolist()), context, None, (), _GREEDY, "{}")
    prefill = prefill_sample(model, sample, {}, {}, 0, ranked=False)
    cache, _ = evict(prefill, {}, (), cache_layout(model).windows, len(ids) - context + _GREEDY)
    nll = continuation_nll(model, cache, ids[context - 1 :], context - 1)[0]
    cache.rewind()
    (tokens,) = greedy_decode(model, cache, ids[context - 1 : context].tolist(), context - 1, _GREEDY, lambda _: False)
    return nll.cpu(), tokens


def _own_logits(model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
    """Logits (keep, vocabulary) of the last tokens by the model's own forward in one call, float32 at least."""
    with attention_implementation(model, "eager"):
        logits = run_model(model, ids[None], None, 0, keep)[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def _own_nll(model: PreTrainedModel, ids: Tensor, context: int) -> Tensor:
    logits = _own_logits(model, ids, len(ids) - context + 1)[:-1]
    return F.cross_entropy(logits, ids[context:], reduction="none")


def _loss_of_greed(model: PreTrainedModel, context: Tensor, generated: Sequence[int]) -> float:
    """How many nats the generated tokens fall short of the most likely ones, at most."""
    text = torch.cat([context, torch.tensor(generated)])
    likelihoods = _own_logits(model, text, len(generated) + 1)[:-1].log_softmax(-1)
    chosen = likelihoods.gather(1, torch.tensor(generated)[:, None])[:, 0]
    return float((likelihoods.amax(-1) - chosen).max())


def _cut_difference(model: PreTrainedModel, ids: Tensor, context: int) -> float:
    """Keys, values and importance of a text that is read in one call and in several."""
    whole, pieces = DynamicCache(), DynamicCache()
    cuts = (context // 2, context)
    importance = run_captured(model, ids, whole, cuts)
    received = {cut: torch.zeros_like(found) for cut, found in importance.items()}
    # Uneven, at cuts and between them; the last pieces are single tokens, as in decoding.
    borders = [0, 1, context // 3, context // 3 + 3, context, len(ids) - 2, len(ids) - 1, len(ids)]
    for first, last in itertools.pairwise(borders):
        for cut, part in run_captured(
            model, ids[first:last], pieces, tuple(cut for cut in cuts if cut <= last)
        ).items():
            received[cut] += part
    return max(_cache_difference(whole, pieces), *(_largest(importance[cut], received[cut]) for cut in cuts))


def _cache_difference(one: DynamicCache, other: DynamicCache) -> float:
    """Largest difference between two caches, as a part of the largest number of a layer."""
    differences = []
    for layer, cut in zip(one.layers, other.layers, strict=True):
        for states, again in ((layer.keys, cut.keys), (layer.values, cut.values)):
            assert states is not None
            assert again is not None
            differences.append(_largest(states, again) / max(float(states.abs().max()), 1e-30))
    return max(differences)


def _attention_difference(model: PreTrainedModel, layout: CacheLayout, ids: Tensor) -> float:
    """The attention that importance and baselines are made of, against the weights that the model gives out."""
    seen: dict[int, Tensor] = {}

    def observe(_: object, layer: ObservedLayer) -> None:
        seen[layer.number] = layer.tails[len(ids)]

    run_captured(model, ids, DynamicCache(), (), Tails((len(ids),), len(ids)), observe)
    with attention_implementation(model, "eager"), torch.inference_mode():
        own = model(input_ids=ids[None].to(model.device), output_attentions=True, use_cache=False).attentions
    if own is None or len(own) != len(layout.modules):
        raise PipelineError(
            f"{model.name_or_path or type(model).__name__} does not give out its attention weights, so importance "
            "cannot be checked; choose another model."
        )
    by_number = dict(zip(layout.modules, own, strict=True))
    return max(_largest(seen[number], by_number[number][0]) for number in layout.ranked)


def _switches(model: PreTrainedModel, layout: CacheLayout) -> list[int]:
    """Lengths, below that of the longest text, at which the config says that positions are computed in another way."""
    config = model.config.get_text_config(decoder=True)
    stated = getattr(config, "rope_parameters", None) or {}
    ropes = [stated, *(rope for rope in stated.values() if isinstance(rope, dict))]
    places = {rope.get("original_max_position_embeddings") for rope in ropes}
    places.add(getattr(config, "original_max_position_embeddings", None))
    if any("dynamic" in str(rope.get("rope_type")) for rope in ropes):
        places.add(config.max_position_embeddings)
    return sorted(int(place) for place in places if place and (layout.tokens is None or place < layout.tokens))


def _switch_difference(model: PreTrainedModel, layout: CacheLayout, place: int) -> float:
    """Keys and values of tokens on both sides of ``place``, cut before it and read in one call."""
    around = min(_AROUND, place)
    beyond = _AROUND if layout.tokens is None else min(_AROUND, layout.tokens - place)
    tokens = _tokens(model, around + beyond)
    caches = []
    # The cut text first: some families never go back to what they computed before the place.
    for borders in ((0, around - around // 3, len(tokens)), (0, len(tokens))):
        cache = DynamicCache()
        for first, last in itertools.pairwise(borders):
            recorder = Recorder((), layout.windows)
            with attention_function(model, partial(capture_attention, recorder=recorder)):
                run_model(model, tokens[None, first:last], cache, place - around + first, 1)
        caches.append(cache)
    return _cache_difference(*caches)


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.cpu().double() - other.cpu().double()).abs().max())
