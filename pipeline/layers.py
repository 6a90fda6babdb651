"""Which layers of a model attend to the whole context. It knows a model's config and nothing else."""

from transformers import PretrainedConfig


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """``full_attention``, ``sliding_attention`` or another kind of transformers', for every layer."""
    window = getattr(config, "sliding_window", None)
    # A window that no text can exceed leaves nothing out.
    slides = window is not None and window < config.max_position_embeddings
    # Without a list, a window is that of every layer (transformers' caches read it so, too).
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return ["full_attention" if kind == "sliding_attention" and not slides else kind for kind in kinds]


def full_attention_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """Numbers of the layers that attend to the whole context: the ones that are captured, ranked and evicted.

    Everything kept per layer (records, agents, rankings, costs) is in this order, so entry ``i`` belongs to the
    model's layer ``full_attention_layers(config)[i]``. The caches of the other layers slide over a window; they
    do not grow with the context, so a ranking over all tokens means nothing there.
    """
    return tuple(layer for layer, kind in enumerate(layer_kinds(config)) if kind == "full_attention")
