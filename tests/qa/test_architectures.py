"""Architectures that are unlike the tests' other ones: sampled and scored as they compute, or refused in one line."""

import copy

import pytest
import torch
from test_sampling import ENDS, PROMPTS, anew, assert_same, build

from common import check_models, head_of, logits_of, response_hidden, sample

LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
STATES = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
STATES |= dict(tie_word_embeddings=False)
USABLE = {
    # Layers from which no rows can be dropped
    "lfm2": dict(layer_types=["conv", "full_attention"], tie_word_embeddings=False),
    "qwen3_5_text": STATES | dict(layer_types=["linear_attention", "full_attention"]),
    "gemma4_text": dict(sliding_window=6, tie_word_embeddings=False),  # heads that differ in size by layer
    "bloom": dict(tie_word_embeddings=False),  # positions from a mask
    "gpt2": dict(tie_word_embeddings=False),  # learned positions
    "phi": dict(partial_rotary_factor=0.5),  # a head with a bias
    # Positions that depend on the longest row
    "llama": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    "phi3": dict(rope_parameters=LONGROPE | dict(original_max_position_embeddings=40)),
}
REFUSED = {
    "granite": (dict(logits_scaling=4.0), "the loss gives other logits"),
    "cohere": (dict(logit_scale=0.1), "the loss gives other logits"),
    "modernbert-decoder": ({}, "the loss gives other logits"),  # a head of several layers
    "mamba": ({}, "sampling with a cache gives other logits"),  # a state that is no key-value cache
}


@pytest.mark.parametrize("kind", USABLE)
def test_rollouts_and_scores_are_those_of_the_model_itself(kind):
    model = build(kind, **USABLE[kind])
    check_models(model, copy.deepcopy(model).bfloat16())
    rollouts = sample(model, PROMPTS, ENDS, 24, entropies=True)
    assert len(set(map(len, rollouts.responses()))) > 3 and rollouts.flops > 0
    assert_same(rollouts, anew(model, PROMPTS, ENDS, 24, leave=kind not in ("lfm2", "qwen3_5_text")))
    static = sample(model, PROMPTS, ENDS, 24, entropies=True, cache="static")
    assert_same(static, anew(model, PROMPTS, ENDS, 24, leave=False))
    with torch.no_grad():
        scored = logits_of(model, response_hidden(model, rollouts), *head_of(model))
        lengths = zip(rollouts.ids, *rollouts.lengths())
        alone = [model(input_ids=ids[None, : p + r]).logits[0, p - 1 : -1] for ids, r, p in lengths]
    torch.testing.assert_close(scored, torch.cat(alone), rtol=1e-4, atol=1e-4)


def refusal(model):
    with pytest.raises(SystemExit) as refused:
        check_models(build("llama"), model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_give_other_numbers_is_refused_when_it_is_loaded(kind):
    config, how = REFUSED[kind]
    model = build(kind, **config)
    assert how in refusal(model) and type(model).__name__ in refusal(model)


def test_whatever_a_model_raises_is_said_in_one_line_and_so_is_what_is_not_finite(monkeypatch):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    assert "not finite" in refusal(model)

    def forward(*args, **options):
        raise KeyError("a bug\nof its own")

    monkeypatch.setattr(model, "forward", forward)
    assert "LlamaForCausalLM" in refusal(model) and "KeyError" in refusal(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5_text"])
def test_a_compiled_model_draws_the_same_and_is_compiled_once(kind):
    """By inductor, on a CPU. Two batches and two calls of one shape: one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(kind, **USABLE.get(kind, {}))
    size = dict(batch_size=9, prompt_len=12)
    found = [sample(model, PROMPTS, (), 20, entropies=True, cache=c, **size) for c in ("static", "compiled") * 2]
    for one in found[1:]:
        assert one.responses() == found[0].responses()
        torch.testing.assert_close(one.nats, found[0].nats, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
