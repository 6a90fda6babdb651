"""The cache for ``generate``: where everything fits it changes nothing; else it does what a slow one does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pipeline.errors import PipelineError
from pipeline.eviction.cache import KVPCache
from pipeline.models.layout import cache_layout
from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from tests.conftest import FAMILIES, MakeModel
from tests.evaluation.test_sweep import IDS, PROMPT_LEN, Letters, make_sample, make_sweep

AGENT = AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "position", "age"))
PADS = torch.tensor([0, 7, 19])


def policy_for(model: PreTrainedModel, seed: int = 0) -> Policy:
    layout = cache_layout(model)
    shape = PolicyShape(len(layout.ranked), layout.kv_heads, layout.head_dim, AGENT)
    policy = Policy(shape, torch.Generator().manual_seed(seed))
    policy.layer_numbers = layout.ranked
    # Scores as far apart as those of a trained policy, that no two tokens tie in.
    with torch.no_grad():
        policy.weights[-1].mul_(10)
    return policy


def ids(tokens: int, batch: int = 1) -> Tensor:
    return (torch.arange(batch)[:, None] * 31 + torch.arange(tokens) * 37) % 125 + 3


def mask(tokens: int, pads: Tensor) -> Tensor:
    return (torch.arange(tokens) >= pads[:, None]).long()


def generate(model: PreTrainedModel, inputs: Tensor, cache: Cache, new: int, **options: Any) -> Tensor:
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": new, "min_new_tokens": new} | options
    found = model.generate(input_ids=inputs, past_key_values=cache, **options)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_where_everything_fits_texts_are_those_of_transformers(family: str, make_model: MakeModel) -> None:
    """A batch with pads, three turns."""
    model = make_model(family)
    padding = mask(60, PADS)
    texts: list[Tensor] = []
    for cache in (
        DynamicCache(config=model.config),
        KVPCache(policy_for(model), 500, attention_mask=padding, model=model),
    ):
        text, seen = ids(60, 3), padding
        for turn in range(3):
            text = generate(model, text, cache, 9, attention_mask=seen)
            text = torch.cat([text, ids(5 + turn, 3)], dim=1)
            seen = torch.cat([padding, torch.ones(3, text.shape[1] - 60, dtype=torch.long)], dim=1)
        texts.append(text)
    assert torch.equal(*texts)


class SlowLayer(DynamicLayer):
    """Holds everything, remembers which tokens are left of each head, and evicts by the book, a token at a time."""

    def __init__(self, policy: Policy, layer: int, budget: int, slack: int, pads: Tensor) -> None:
        super().__init__()
        self.policy, self.layer, self.budget, self.slack, self.pads = policy, layer, budget, slack, pads
        self.left: list[list[list[int]]] = []

    def update(self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        batch, heads, new, width = key_states.shape
        before = super().get_seq_length()
        keys, values = super().update(key_states, value_states, cache_kwargs)
        if not self.left:
            self.left = [[[] for _ in range(heads)] for _ in range(batch)]
        for rows in self.left:
            for row in rows:
                row.extend(range(before, before + new))
        index = torch.tensor(self.left)[..., None].expand(-1, -1, -1, width)
        attended = keys.gather(2, index), values.gather(2, index)
        if len(self.left[0][0]) > self.budget + (self.slack if new == 1 else 0):
            for text in range(batch):
                for head in range(heads):
                    self.left[text][head] = self.kept(text, head)
        return attended

    def kept(self, text: int, head: int) -> list[int]:
        pads, seen = int(self.pads[text]), self.keys.shape[2]
        worth = {}
        for token in self.left[text][head]:
            place = token - pads
            if place < 0:
                worth[token] = -float("inf")
            elif place < 4 or token >= seen - 16:
                worth[token] = float("inf")
            else:
                worth[token] = self.score(text, head, token, place, seen - pads)
        best = sorted(worth, key=lambda token: (worth[token], token), reverse=True)
        return sorted(best[: self.budget])

    def score(self, text: int, head: int, token: int, place: int, length: int) -> float:
        """The agent of this head as it is described, in float64."""
        shape, number = self.policy.shape, self.layer * self.policy.shape.kv_heads + head
        position = [torch.tensor([part], dtype=torch.float64) for part in numbers_of(place, length)]
        states = torch.cat([self.keys[text, head, token], self.values[text, head, token]]).double()
        seen = (states - self.policy.mean[number, 0].double()) / self.policy.std[number, 0].double()
        hidden = torch.cat([seen, *position])
        assert len(hidden) == shape.widths[0]
        for index, (weight, bias) in enumerate(zip(self.policy.weights, self.policy.biases, strict=True)):
            hidden = hidden @ weight[number].double() + bias[number, 0].double()
            if index < shape.agent.hidden_layers:
                hidden = hidden.relu()
        return float(hidden)

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        held = len(self.left[0][0]) if self.left else 0
        return held + len(cache_position), self.get_seq_length() - held


def numbers_of(place: int, length: int) -> tuple[float, float]:
    """What agents see of a position and of an age, of a whole cache: that of the token itself."""
    from pipeline.policy.inputs.base import INPUTS, CachedTokens

    tokens = CachedTokens(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([[place]]), torch.tensor([[length]]))
    position, age = (float(INPUTS.load(name)().of(tokens).double()) for name in ("position", "age"))
    return position, age


@pytest.mark.parametrize("slack", [0, 5])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_evicting_is_what_a_slow_cache_does(family: str, slack: int, make_model: MakeModel) -> None:
    """Prompts in parts, answers and turns, texts with pads."""
    model = make_model(family)
    policy, padding, budget = policy_for(model), mask(60, PADS), 24
    slow = Cache(layers=[SlowLayer(policy, layer, budget, slack, PADS) for layer in range(policy.shape.layers)])
    fast = KVPCache(policy, budget, slack=slack, attention_mask=padding)
    texts = []
    for cache in (slow, fast):
        text, seen, out = ids(60, 3), padding, []
        for start in range(0, 60, 25):  # parts of a prompt
            part = text[:, start : start + 25]
            with torch.no_grad():
                places = (seen.cumsum(1) - 1).clamp_min(0)[:, start : start + 25]
                found = model(part, attention_mask=seen[:, : start + 25], position_ids=places, past_key_values=cache)
                out.append(found.logits[:, -1])
        for turn in range(2):
            text = torch.cat([text, out[-1].argmax(-1, keepdim=True), ids(3 + turn, 3)], dim=1)
            text = generate(
                model,
                text,
                cache,
                9,
                attention_mask=torch.cat([padding, torch.ones(3, text.shape[1] - 60, dtype=torch.long)], dim=1),
            )
        texts.append((text, torch.stack(out)))
    assert torch.equal(texts[0][0], texts[1][0])
    torch.testing.assert_close(texts[0][1], texts[1][1], rtol=1e-4, atol=1e-4)
    for layer, expected in zip(fast.layers, slow.layers, strict=True):
        assert (layer.positions + PADS[:, None, None]).tolist() == expected.left
        assert layer.held <= budget + slack


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_texts_are_those_of_the_sweep(family: str, make_model: MakeModel) -> None:
    """Which feeds the last token of a context again, and ranks no more while it writes."""
    model = make_model(family)
    sweep = make_sweep(model)
    said = {(one.key, one.budget): one.text for one in sweep.run(make_sample(("zzz",)), seed=1)[0] if one.text}
    context = torch.tensor([IDS[:PROMPT_LEN]])
    for key, policy in sweep.policies.items():
        for budget in (24, 48):
            cache = KVPCache(policy, budget, slack=100)
            with torch.no_grad():
                model(context, past_key_values=cache)
            cache.crop(PROMPT_LEN - 1)
            written = generate(model, context, cache, 6)[0, PROMPT_LEN:].tolist()
            assert said[key, budget] == Letters().decode(written, skip_special_tokens=True)


def test_a_policy_is_told_true_positions_and_the_true_length(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    policy = policy_for(model)
    told = []
    score = policy.score
    monkeypatch.setattr(policy, "score", lambda tokens, layer: told.append(tokens) or score(tokens, layer))
    generate(model, ids(70), KVPCache(policy, 30, slack=4), 12)
    lengths = [int(tokens.cache_size.unique()) for tokens in told if tokens.keys.shape[1]][:: policy.shape.layers]
    assert lengths == [70, 75, 80]
    last = told[-1]
    assert (last.positions.diff(dim=1) > 0).all()
    assert last.positions.max() == 79
    assert (last.positions[:, :4] == torch.arange(4)).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_memory_is_that_of_the_budget(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    layout = cache_layout(model)
    cache = KVPCache(policy_for(model), 40, slack=8, model=model)
    sizes = []
    text = ids(100)
    for _ in range(4):
        text = generate(model, text, cache, 30)
        text = torch.cat([text, ids(3)], dim=1)
        sizes.append(cache.nbytes)
    token = layout.kv_heads * (2 * 4 * layout.head_dim + 8)
    sliding = sum(2 * 4 * layout.kv_heads * layout.head_dim * (window - 1 + 1) for window in layout.windows.values())
    assert max(sizes) <= len(layout.ranked) * 48 * token + 2 * sliding
    assert cache.get_seq_length() == text.shape[1] - 3 - 1
    # Without eviction it would hold what a cache does that has room for everything.
    whole = KVPCache(policy_for(model), 1000, model=model)
    with torch.no_grad():
        model(text[:, :-4], past_key_values=whole)
    evicted = (
        sum(cache.layers[number].nbytes_of_all for number in layout.ranked),
        sum(whole.layers[number].keys.nbytes * 2 for number in layout.ranked),
    )
    assert evicted[0] == evicted[1]
    others = set(range(len(cache.layers))) - set(layout.ranked)
    assert cache.nbytes_of_all - evicted[0] == sum(
        cache.layers[number].keys.untyped_storage().nbytes() * 2 for number in others
    )
    assert 40 <= cache.held <= 48
    assert whole.held == whole.get_seq_length()


def test_beams_go_with_their_tokens(make_model: MakeModel) -> None:
    """Where everything fits, as transformers' own; where not, each beam is ranked by itself."""
    model = make_model("llama")
    options = {"num_beams": 3, "num_return_sequences": 3}
    plain = generate(model, ids(40), DynamicCache(), 12, **options)
    assert torch.equal(generate(model, ids(40), KVPCache(policy_for(model), 200), 12, **options), plain)
    cache = KVPCache(policy_for(model), 24, slack=3)
    found = generate(model, ids(40), cache, 12, **options)
    assert found.shape == plain.shape
    assert all(layer.held <= 27 for layer in cache.layers)


def test_tokens_can_be_taken_back_as_long_as_none_was_evicted(make_model: MakeModel) -> None:
    model = make_model("llama")
    policy = policy_for(model)
    cache = KVPCache(policy, 30)
    with torch.no_grad():
        model(ids(50), past_key_values=cache)
        cache.crop(49)
        assert (cache.get_seq_length(), cache.layers[0].held) == (49, 29)
        again = model(ids(50)[:, 49:], past_key_values=cache)
        # Fed again, it sees what was kept, not what it saw in the prompt.
        assert again.logits.shape[1] == 1
        with pytest.raises(PipelineError, match=r"^17 tokens cannot be taken back: only of the last 16 "):
            cache.crop(33)
    whole = KVPCache(policy, 60)
    with torch.no_grad():
        model(ids(50), past_key_values=whole)
    whole.crop(-45)
    assert whole.get_seq_length() == whole.layers[0].held == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_can_be_used_again_after_a_reset(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    cache = KVPCache(policy_for(model), 30, slack=2, model=model)
    with torch.no_grad():
        first = model(ids(50), past_key_values=cache).logits
        cache.reset()
        assert cache.nbytes == cache.get_seq_length() == 0
        model(ids(20, 2), past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(ids(50), past_key_values=cache).logits, first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 19}, r"^budget=19 is below the 20 protected tokens; raise it\.$"),
        ({"budget": 0}, r"^budget=0 is no number of tokens; 1 is the least\.$"),
        ({"budget": 30.5}, r"^budget=30\.5 is no number of tokens"),
        ({"budget": 30, "slack": -1}, r"^slack=-1 is no number of tokens; 0 is the least\.$"),
        ({"budget": 30, "n_sink": -10}, r"^n_sink=-10 is no number of tokens"),
        ({"budget": 30, "n_recent": -1}, r"^n_recent=-1 is no number of tokens"),
        ({"budget": 30, "attention_mask": torch.tensor([[1, 1, 0]])}, "has pads behind a text or within it"),
        ({"budget": 30, "attention_mask": torch.tensor([[1, 0, 1]])}, "has pads behind a text or within it"),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(PipelineError, match=message):
        KVPCache(policy_for(make_model("llama")), **options)


def test_pads_that_nobody_told_of_are_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    with pytest.raises(PipelineError, match="begin elsewhere than the cache was told"):
        generate(model, ids(60, 3), KVPCache(policy_for(model), 30), 3, attention_mask=mask(60, PADS))
    told = KVPCache(policy_for(model), 30, attention_mask=mask(60, PADS - torch.tensor([0, 0, 1])))
    with pytest.raises(PipelineError, match="begin elsewhere than the cache was told"):
        generate(model, ids(60, 3), told, 3, attention_mask=mask(60, PADS))
    many = KVPCache(policy_for(model), 30, attention_mask=mask(60, torch.tensor([40])))
    places = (torch.arange(60)[None] - 7).clamp_min(0)
    with torch.no_grad():
        model(ids(30), position_ids=places[:, :30], past_key_values=many)
        with pytest.raises(
            PipelineError, match="begin elsewhere than the cache was told"
        ):  # which only this part shows
            model(ids(60)[:, 30:], position_ids=places[:, 30:], past_key_values=many)
    with pytest.raises(PipelineError, match="attention mask is of 3 texts and the model reads 1"):
        generate(model, ids(60), KVPCache(policy_for(model), 30, attention_mask=mask(60, PADS)), 3)


@pytest.mark.parametrize("budget", [40, 500])
def test_pads_of_a_later_turn_are_refused(budget: int, make_model: MakeModel) -> None:
    model = make_model("llama")
    cache = KVPCache(policy_for(model), budget, attention_mask=mask(60, PADS))
    text = generate(model, ids(60, 3), cache, 6, attention_mask=mask(60, PADS))
    seen = torch.cat([mask(60, PADS), torch.ones(3, 6, dtype=torch.long), mask(20, torch.tensor([0, 5, 12]))], dim=1)
    with pytest.raises(PipelineError, match="or that have pads within them"):
        generate(model, torch.cat([text, ids(20, 3)], dim=1), cache, 6, attention_mask=seen)


def test_another_models_policy_is_refused(make_model: MakeModel) -> None:
    gemma, llama = make_model("gemma3"), make_model("llama")
    with pytest.raises(PipelineError, match=r"^The policy ranks layers 0, 1, 2, .* but the model has layers 1, 3, "):
        KVPCache(policy_for(llama), 30, model=gemma)
    with pytest.raises(PipelineError, match=r"^The policy ranks layers 1, 3 of a model, not 0; name the model"):
        generate(gemma, ids(40), KVPCache(policy_for(gemma), 30), 3)
    other = Policy(PolicyShape(3, 2, 8, AGENT), torch.Generator())
    with pytest.raises(
        PipelineError, match=r"^The policy ranks 2 KV heads of dimension 8, but the model has 2 KV heads"
    ):
        generate(llama, ids(10), KVPCache(other, 30), 3)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_model_writes_the_same(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    policy = policy_for(model)
    plain = generate(model, ids(40), KVPCache(policy, 24, slack=2), 8)
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"))
    cache = KVPCache(policy, 24, slack=2)
    assert torch.equal(generate(model, ids(40), cache, 8), plain)
    assert cache.held <= 26


def test_a_model_of_fewer_layers_is_noticed(make_model: MakeModel) -> None:
    model = make_model("llama")
    policy = policy_for(model)
    shape = PolicyShape(policy.shape.layers + 1, policy.shape.kv_heads, policy.shape.head_dim, AGENT)
    cache = KVPCache(Policy(shape, torch.Generator().manual_seed(0)), 24)
    with pytest.raises(PipelineError, match="policy ranks layers 0, 1, 2, 3 of a model, and this one has 3; train a"):
        generate(model, ids(40), cache, 2)


def test_more_than_there_is_may_be_taken_back(make_model: MakeModel) -> None:
    """Down to nothing, as if it had never been read."""
    model = make_model("llama")
    cache = KVPCache(policy_for(model), 100)
    with torch.no_grad():
        first = model(ids(30), past_key_values=cache).logits
        cache.crop(-31)
        assert cache.get_seq_length() == cache.held == 0
        torch.testing.assert_close(model(ids(30), past_key_values=cache).logits, first)
