"""The colours of tokens by their place in an order. It knows neither texts nor policies.

A perceptually uniform map that reads with any colour vision and in grey. Kept tokens take its dark part and evicted
ones its light part, with a step in between; on each of the two parts one ink can be read.
"""

import matplotlib
import numpy as np
import numpy.typing as npt

COLOUR_MAP = "magma_r"
KEPT_PART, EVICTED_PART, STEPS = (0.85, 0.5), (0.22, 0.0), 12
KEPT_INK, EVICTED_INK = "#ffffff", "#404040"


def ramps() -> tuple[list[str], list[str]]:
    """Backgrounds of kept and of evicted tokens, from kept longest to evicted first."""
    colour_map = matplotlib.colormaps[COLOUR_MAP]
    kept, evicted = (
        [matplotlib.colors.to_hex(colour) for colour in colour_map(np.linspace(*part, STEPS))]
        for part in (KEPT_PART, EVICTED_PART)
    )
    return kept, evicted


def backgrounds(ranks: npt.NDArray[np.int32], n: int, budget: int) -> list[str]:
    """The background of each rank in a cache of n tokens of which ``budget`` are kept."""
    kept, evicted = ramps()
    return [
        kept[rank * STEPS // budget] if rank < budget else evicted[(rank - budget) * STEPS // (n - budget)]
        for rank in ranks.tolist()
    ]
