"""A sliding layer's cache against a float64 reference that holds every row's whole text."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.sliding import SlidingLayer


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float) -> torch.Tensor:
    """The last queries (heads, t, head_dim) of one row over all of its tokens (kv_heads, n, head_dim), one by one."""
    heads, new, _ = query.shape
    kv_heads, tokens, _ = key.shape
    output = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(heads):
        of_group = head * kv_heads // heads
        for step in range(new):
            last = tokens - new + step
            seen = slice(max(0, last - window + 1), last + 1)
            logits = key[of_group, seen].double() @ query[head, step].double() * scaling
            output[head, step] = torch.softmax(logits, -1) @ value[of_group, seen].double()
    return output


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    before=st.integers(0, 30),
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    window=st.integers(2, 20),
    seed=st.integers(0, 2**31),
)
def test_every_step_equals_the_reference(
    rows: int, kv_heads: int, groups: int, before: int, steps: list[int], window: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shared = [torch.randn(kv_heads, before, 4, generator=generator) for _ in range(2)]
    layer = SlidingLayer(window, *(states[:, max(0, before - window + 1) :] for states in shared))
    texts = [states.expand(rows, -1, -1, -1) for states in shared]  # every row's keys, and values
    for index, new in enumerate(steps):
        appended = [torch.randn(rows, kv_heads, new, 4, generator=generator) for _ in range(2)]
        query = torch.randn(rows, kv_heads * groups, new, 4, generator=generator)
        layer.append(appended[0], appended[1])
        texts = [torch.cat([text, more], dim=2) for text, more in zip(texts, appended, strict=True)]
        found = layer.attend(query, scaling=0.7)
        for row in range(rows):
            expected = reference(query[row], texts[0][row], texts[1][row], window, 0.7)
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)
        if rows > 1 and index == 0:
            keep = torch.arange(rows) != 0
            layer.select(keep)
            texts, rows = [text[keep] for text in texts], rows - 1


def test_rows_share_what_they_continue_from() -> None:
    keys = torch.zeros(2, 10, 4)
    layer = SlidingLayer(11, keys, keys)
    for count in (1, 2):
        layer.append(torch.zeros(50, 2, 1, 4), torch.zeros(50, 2, 1, 4))
        assert layer.nbytes == 2 * 4 * (2 * 10 * 4 + 50 * 2 * count * 4)
