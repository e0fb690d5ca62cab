"""Architectures that are unlike the tests' other ones: sampled and scored as they compute, or refused."""

import pytest
import torch
import transformers
from pretend_gpu import pretended

import opd
from common import draw, make_rollouts, sample, uniforms
from plumbing.fast import check_logits, response_hidden, token_log_probs
from plumbing.models import Vocab, load_model

VOCAB = Vocab(60, tuple(range(2, 12)), 0)  # ends that random models say soon
PROMPTS = [tuple(range(12, 13 + n % 7)) for n in range(10)]
KEYS = [(0, 0, i) for i in range(10)]
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
STATES = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
USABLE = {
    # Layers from which no rows can be dropped
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_5_text": STATES | dict(layer_types=["linear_attention", "full_attention"]),
    "gemma4_text": dict(sliding_window=6),  # heads that differ in size by layer
    "bloom": dict(n_head=4, n_layer=2),  # positions from a mask
    "gpt2": dict(n_head=4, n_layer=2, n_embd=32),  # learned positions
    # Positions that depend on the longest row
    "llama": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    "phi3": dict(rope_parameters=LONGROPE | dict(original_max_position_embeddings=40)),
}
REFUSED = {
    "granite": (dict(logits_scaling=4.0), "its hidden states times one matrix"),
    "cohere2": (dict(logit_scale=0.1), "its hidden states times one matrix"),
    "modernbert-decoder": ({}, "its hidden states times one matrix"),  # a head of several layers
    "mamba": ({}, "decoding with a key-value cache"),
}


def build(kind, config):
    common = dict(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    if "n_head" in config:  # older names
        common = {name: common[name] for name in ("vocab_size", "pad_token_id", "initializer_range")} | {"hidden_size": 32}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**common | config)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def anew(model, i, cap):
    """A response and its log-probabilities by the model alone: all of it read anew for every token."""
    ids, u, log_probs = list(PROMPTS[i]), uniforms([KEYS[i]], cap, "rollout")[0], []
    for t in range(cap):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        ids.append(draw(logits.softmax(-1), u[t]).item())
        log_probs.append(logits.log_softmax(-1)[ids[-1]].item())
        if ids[-1] in VOCAB.end_ids:
            break
    return ids[len(PROMPTS[i]) :], log_probs


@pytest.mark.parametrize("kind", USABLE)
def test_rollouts_and_scores_are_those_of_the_model_itself(kind, monkeypatch):
    model = build(kind, USABLE[kind])
    check_logits(model, VOCAB)
    rollouts = sample(model, PROMPTS, KEYS, VOCAB, 24)
    responses, log_probs = zip(*(anew(model, i, 24) for i in range(10)))
    assert rollouts.responses() == list(responses) and len(set(map(len, responses))) > 2
    assert rollouts.flops > 0
    found = token_log_probs(model, rollouts, VOCAB)
    torch.testing.assert_close(found, torch.tensor(sum(log_probs, [])), rtol=1e-4, atol=1e-4)
    with pretended(monkeypatch) as gpu:  # where a decode step is recorded, if the model can be used that way
        on_gpu = model.to("cuda:0")
        assert sample(on_gpu, PROMPTS, KEYS, VOCAB, 24).responses() == list(responses)
        assert (gpu.replays > 5) == (kind in ("gemma4_text", "gpt2", "phi3"))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_give_other_numbers_is_refused_when_it_is_loaded(kind, tmp_path):
    config, how = REFUSED[kind]
    build(kind, config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()  # not read here
    with pytest.raises(SystemExit, match=how):
        load_model(str(tmp_path), opd.Args(precision="fp32"))


def test_a_row_is_scored_as_if_alone_however_long_the_others_prompts_and_responses_are():
    """Phi-3's positions depend on the width of what is read: a long prompt beside a long response is no long row."""
    original = dict(original_max_position_embeddings=128)
    model = build("phi3", original | dict(rope_parameters=LONGROPE | original))
    prompts, responses = [(5, 6, 7), tuple(range(12, 52)) * 2], [tuple(range(20, 55)) * 2, (11, 12)]
    both = make_rollouts(prompts, responses, [False] * 2, KEYS[:2], VOCAB, "cpu")
    alone = make_rollouts(prompts[:1], responses[:1], [False], KEYS[:1], VOCAB, "cpu")
    torch.testing.assert_close(response_hidden(model, both)[:70], response_hidden(model, alone), rtol=1e-4, atol=1e-5)
