"""How layers are numbered, and what a config says of them before there is a model to ask (``pipeline/layout.py``)."""

from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A layer's number in the model, and its index among the ranked ones: agents, records, rankings and costs are kept in
# the order of the latter. In a model whose layers all attend to the whole context the two are equal.
ModelLayer = NewType("ModelLayer", int)
RankedLayer = NewType("RankedLayer", int)


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
