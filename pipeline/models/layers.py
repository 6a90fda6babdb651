"""How layers are numbered, and what a config says of them before there is a model (``pipeline/models/layout.py``)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A layer's number in the model, and its index among the ranked ones: agents, records, rankings and costs are kept in
# the order of the latter. In a model whose layers all attend to the whole context the two are equal.
ModelLayer = NewType("ModelLayer", int)
RankedLayer = NewType("RankedLayer", int)


def layer_number(module: Any) -> ModelLayer:
    """The number that every attention module carries of its layer."""
    return ModelLayer(int(module.layer_idx))


# Names that configs give the length of the longest text.
_WINDOWS = ("max_position_embeddings", "n_positions")


def layer_kinds(config: "PretrainedConfig") -> list[str]:
    """``full_attention``, ``sliding_attention`` or another kind of transformers', for every layer."""
    window = getattr(config, "sliding_window", None)
    # A window that no text can exceed leaves nothing out.
    slides = window is not None and window < config.max_position_embeddings
    # Without a list, a window is that of every layer (transformers' caches read it so, too).
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return ["full_attention" if kind == "sliding_attention" and not slides else kind for kind in kinds]


def full_attention_layers(config: "PretrainedConfig") -> tuple[ModelLayer, ...]:
    """Numbers of the layers that attend to the whole context, as the config tells it."""
    return tuple(ModelLayer(layer) for layer, kind in enumerate(layer_kinds(config)) if kind == "full_attention")


def readable_tokens(value_of: Callable[[str], Any]) -> int | None:
    """Length of the longest text that a model was made for, None where its config does not say.

    ``value_of`` looks a key of the config's language part up; None where there is none.

    Raises
    ------
    ValueError
        What the config says is no number of tokens.
    """
    stated = next((found for name in _WINDOWS if (found := value_of(name)) is not None), None)
    # Some configs give the length before positions are stretched (Qwen2.5 with YaRN), others the one after.
    rope = value_of("rope_parameters") or value_of("rope_scaling") or {}
    try:
        ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        stretched = max((r.get("factor") or 1) * (r.get("original_max_position_embeddings") or 0) for r in ropes)
        tokens = None if stated is None else int(max(stated, stretched))
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None
    if tokens is not None and tokens < 1:
        raise ValueError(f"{tokens} is no number of tokens")
    return tokens
