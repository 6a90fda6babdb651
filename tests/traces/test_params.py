"""Where sequences are cut."""

import torch

from pipeline.traces.params import TracesParams, training_cuts, validation_cut

PARAMS = TracesParams(cuts=3, at_prompt_end=0.0, tokens=None, sequences_per_shard=1, seed=0)


def cuts(share: float, tokens: int = 100, prompt: int = 80, count: int = 2000) -> list[int]:
    params = PARAMS.model_copy(update={"at_prompt_end": share})
    return [cut for sample in range(count) for cut in training_cuts(tokens, prompt, f"s{sample}", params)]


def test_cuts_are_uniform_with_a_token_behind_them() -> None:
    found = torch.tensor(cuts(0.0))
    assert (found.min(), found.max()) == (2, 99)
    counts = found.bincount(minlength=100)[2:].double()
    expected = len(found) / 98
    # Chi-squared with 97 degrees of freedom: mean 97, standard deviation 14.
    assert ((counts - expected).square() / expected).sum() < 97 + 5 * 14


def test_the_share_at_the_prompt_s_end_is_the_one_asked_for() -> None:
    assert set(cuts(1.0)) == {80}
    share = sum(cut == 80 for cut in cuts(0.4)) / 6000
    assert abs(share - (0.4 + 0.6 / 98)) < 0.03
    # Where the others lie does not change with it.
    assert {cut for cut in cuts(0.4) if cut != 80} <= set(cuts(0.0))


def test_cuts_depend_on_seed_and_sample_alone() -> None:
    assert training_cuts(100, 80, "a", PARAMS) == training_cuts(100, 80, "a", PARAMS)
    assert training_cuts(100, 80, "a", PARAMS) != training_cuts(100, 80, "b", PARAMS)
    assert training_cuts(100, 80, "a", PARAMS) != training_cuts(100, 80, "a", PARAMS.model_copy(update={"seed": 1}))


def test_the_shortest_sequences() -> None:
    assert training_cuts(3, 1, "a", PARAMS.model_copy(update={"at_prompt_end": 1.0})) == (2, 2, 2)
    assert [validation_cut(tokens) for tokens in (3, 4, 5, 9)] == [2, 2, 2, 4]
