"""Sampling: the right distribution, the right end, and rollouts that depend on (seed, step, row) alone."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_checkpoint, masked_inputs

from common import draw, make_rollouts, sample, uniforms
from plumbing import fast
from plumbing.fast import response_hidden, sampling_logits, sequence_flops
from plumbing.models import Vocab


@pytest.fixture(scope="module", params=["Qwen3", "Llama"])
def model(request, tmp_path_factory):
    """A tiny model whose checkpoint carries a hostile generation_config, as Qwen3's own does."""
    path = make_checkpoint(tmp_path_factory.mktemp("model"), arch=request.param, seed=3)
    hostile = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.3, eos_token_id=[1, 2])
    Path(path, "generation_config.json").write_text(json.dumps(hostile))
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def vocab_of(model, end_ids=()):
    return Vocab(model.config.vocab_size, tuple(end_ids), pad_id=0)


PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13), (14,), (20, 21)]


def keys_for(prompts, step=1):
    return [(0, step, row) for row in range(len(prompts))]


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 7), (2.0, 0.9, 20)]
)
def test_what_is_sampled_is_the_stated_distribution(model, temperature, top_p, top_k):
    """Chi-square over 4,000 one-token rollouts: T, top_p and top_k are the arguments', not the checkpoint's."""
    n = 4000
    prompts = [PROMPTS[1]] * n
    rollouts = sample(model, prompts, keys_for(prompts), vocab_of(model), 1, temperature, top_p, top_k)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[:, -1].double()
    filters = [transformers.TemperatureLogitsWarper(temperature)]  # those that generate() would use
    filters += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    filters += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = transformers.LogitsProcessorList(filters)(None, logits)[0].softmax(-1)
    counts = torch.bincount(rollouts.ids[:, -1], minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    big = expected * n >= 5  # the rest goes into one bin
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    wanted = torch.cat([expected[big], expected[~big].sum()[None]]) * n
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi2, freedom = ((observed - wanted) ** 2 / wanted).sum().item(), len(wanted) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {chi2:.0f} with {freedom} degrees of freedom"


def test_the_cache_gives_the_same_tokens_as_reading_everything_anew(model, monkeypatch):
    """Without cache, without padding, one row at a time: the plainest sampler there is draws the same tokens."""
    monkeypatch.setattr(fast._GrowingLayer, "room", 5)
    new, vocab = 12, vocab_of(model)
    rollouts = sample(model, PROMPTS, keys_for(PROMPTS), vocab, new)
    u = uniforms(keys_for(PROMPTS), new, "rollout")
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for t in range(new):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(draw(logits.softmax(-1)[None], u[i, t][None])))
        assert rollouts.responses()[i] == ids[len(prompt) :]


def test_rollouts_do_not_depend_on_the_company_they_are_sampled_in(model):
    """Any split over micro-batches or processes, any order: row i's numbers are keyed by (seed, step, i)."""
    vocab, keys = vocab_of(model, [3, 4, 5, 17, 30, 31, 32, 60, 61, 99]), keys_for(PROMPTS)
    together = sample(model, PROMPTS, keys, vocab, 40).responses()
    for rows in ([3, 1], [0], [2, 0, 3]):
        alone = sample(model, [PROMPTS[i] for i in rows], [keys[i] for i in rows], vocab, 40).responses()
        assert alone == [together[i] for i in rows]
    assert sample(model, PROMPTS, keys_for(PROMPTS, step=2), vocab, 40).responses() != together
    longer = sample(model, PROMPTS, keys, vocab, 64).responses()
    assert [r[:40] for r in longer] == together, "a longer cap continues the same responses"


ARCHITECTURES = {  # what differs in a cache: norms of keys, biases, soft caps, windows shorter than the sequences
    "qwen3": dict(arch="Qwen3", tied=True),
    "qwen3-untied": dict(arch="Qwen3", tied=False),
    "qwen2": dict(arch="Qwen2"),
    "qwen2-sliding": dict(arch="Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "llama": dict(arch="Llama"),
    "gemma2": dict(arch="Gemma2", head_dim=8, sliding_window=6, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "mistral": dict(arch="Mistral", sliding_window=5),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_model(request, tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"), seed=3, **ARCHITECTURES[request.param])
    attention = "eager" if request.param == "gemma2" else "sdpa"
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval()


def many(model):
    """Sixteen prompts of one to seven tokens, and end tokens that random models say after 1 to 60 tokens."""
    prompts = [tuple(range(5, 6 + n % 7)) for n in range(16)]
    return prompts, keys_for(prompts), vocab_of(model, range(3, 15))


def test_a_cache_of_fixed_size_gives_the_same_rollouts(any_model, monkeypatch):
    """What a GPU records as a graph, step by step on a CPU, growing by blocks and dropping rows: the same tokens, ends
    and entropies as the cache that grows."""
    prompts, keys, vocab = many(any_model)
    monkeypatch.setattr(fast.FixedCache, "block", 8)
    monkeypatch.setattr(fast._GrowingLayer, "room", 5)
    expected = sample(any_model, prompts, keys, vocab, 64, entropies=True, cache="growing")
    assert len(set(map(len, expected.responses()))) > 8
    for slices in (0, 3):
        found = sample(any_model, prompts, keys, vocab, 64, entropies=True, cache="fixed", at_once=slices)
        assert found.responses() == expected.responses() and found.ended.tolist() == expected.ended.tolist()
        torch.testing.assert_close(found.entropy[found.mask], expected.entropy[found.mask], rtol=1e-4, atol=1e-4)


def test_both_caches_run_where_weights_are_fp32_and_activations_bf16(any_model, monkeypatch):
    """Qwen3's keys are then fp32 and its values bf16. In half precision a draw can flip, so the first tokens' entropies
    are compared, which depend on the prompts alone."""
    prompts, keys, vocab = many(any_model)
    exact = sample(any_model, prompts, keys, vocab, 20, entropies=True).entropy[:, 0]
    monkeypatch.setattr(any_model, "autocasts", True, raising=False)
    for cache in ("growing", "fixed"):
        rollouts = sample(any_model, prompts, keys, vocab, 20, entropies=True, cache=cache)
        torch.testing.assert_close(rollouts.entropy[:, 0], exact, rtol=0.05, atol=0.05)


def test_weights_are_cast_to_bf16_once_and_not_at_every_step(model, monkeypatch):
    monkeypatch.setattr(model, "autocasts", True, raising=False)
    with torch.profiler.profile(record_shapes=True) as profiler:
        sample(model, PROMPTS, keys_for(PROMPTS), vocab_of(model), 4, cache="growing")
    shape = list(model.base_model.layers[0].mlp.gate_proj.weight.shape)
    casts = [e for e in profiler.events() if e.name == "aten::_to_copy" and e.input_shapes[0] == shape]
    assert len(casts) == 2 * len(model.base_model.layers), "of gate and up"


def test_the_fixed_cache_does_not_wait_for_its_longest_row_at_full_width(model, monkeypatch):
    """Rows times columns that attention reads: with one long response among fifteen short ones, less than a third of
    what a cache of the final size reads."""
    monkeypatch.setattr(fast.FixedCache, "block", 16)
    prompts, new, read = [(5, 6, 7)] * 16, 120, []
    step = fast.FixedCache.step
    monkeypatch.setattr(
        fast.FixedCache, "step", lambda self, y=None: read.append(self.filled.numel()) or step(self, y)
    )
    ends = lambda y, _: (torch.arange(len(y)) > 0) & (len(read) > 4 + torch.arange(len(y)))  # noqa: E731  all but row 0
    monkeypatch.setattr(torch, "isin", ends)
    rollouts = sample(model, prompts, keys_for(prompts), vocab_of(model), new, cache="fixed")
    lengths = list(map(len, rollouts.responses()))
    assert lengths[0] == new and max(lengths[1:]) <= 20
    assert sum(read) < 0.33 * 16 * (3 + new) * new


def test_auto_uses_the_fixed_cache_where_it_pays_and_works(any_model, monkeypatch):
    """It pays on a GPU; here we only pretend that there is one."""
    assert fast.decoder_for(any_model, "auto") is fast.GrowingCache
    on_gpu = type("Parameter", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(type(any_model), "parameters", lambda self: iter([on_gpu]))
    assert fast.decoder_for(any_model, "auto") is fast.FixedCache
    unusable = [
        (any_model.config, "_attn_implementation", "flash_attention_2"),
        (any_model.config, "layer_types", ["full_attention", "linear_attention"]),
        (any_model, "_can_compile_fullgraph", False),
        (any_model, "body", "of a sharded model"),
    ]
    for where, name, value in unusable:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value, raising=False)
            assert fast.decoder_for(any_model, "auto") is fast.GrowingCache
    assert fast.decoder_for(any_model, "auto") is fast.FixedCache


def test_scoring_without_masks_equals_scoring_with_them(any_model):
    prompts, keys, vocab = many(any_model)
    rollouts = sample(any_model, prompts, keys, vocab, 64)
    with torch.no_grad():
        states = any_model.base_model(**masked_inputs(rollouts), use_cache=False).last_hidden_state
        expected = states[:, rollouts.prompt_len - 1 : -1][rollouts.mask]
        torch.testing.assert_close(response_hidden(any_model, rollouts), expected, rtol=1e-5, atol=1e-5)


def test_rollouts_stop_at_every_end_token_and_the_end_token_counts(model):
    free = sample(model, PROMPTS * 8, keys_for(PROMPTS * 8), vocab_of(model), 40).responses()
    ends = {free[0][5], free[1][9]}  # both models' end tokens: two ids that really occur
    stopped = sample(model, PROMPTS * 8, keys_for(PROMPTS * 8), vocab_of(model, ends), 40)
    for long, short, ended in zip(free, stopped.responses(), stopped.ended.tolist()):
        first = next((t for t, y in enumerate(long) if y in ends), None)
        assert short == (long if first is None else long[: first + 1]) and ended == (first is not None)
    assert stopped.ended[0] and stopped.ended[1] and len(set(map(len, stopped.responses()))) > 3


def test_pad_equal_to_eos_does_not_hide_the_end():
    """[a, b, eos, pad] with pad == eos: three response tokens, because a mask says so and not an id."""
    vocab = Vocab(10, (9,), pad_id=9)
    rollouts = make_rollouts([(1,), (1, 2)], [(5, 6, 9), (5, 6, 7, 8)], [True, False], keys_for([0, 0]), vocab, "cpu")
    assert rollouts.mask.sum(1).tolist() == [3, 4] and rollouts.ids[0].tolist() == [9, 1, 5, 6, 9, 9]


def test_entropies_are_those_of_the_model_at_temperature_1(model):
    rollouts = sample(model, PROMPTS, keys_for(PROMPTS), vocab_of(model, [3]), 10, temperature=0.3, entropies=True)
    with torch.no_grad():
        p = model(**masked_inputs(rollouts)).logits[:, rollouts.prompt_len - 1 : -1].double().softmax(-1)
    expected = -(p * p.log()).sum(-1)
    torch.testing.assert_close(rollouts.entropy[rollouts.mask].double(), expected[rollouts.mask], rtol=1e-4, atol=1e-4)


def test_greedy_is_temperature_0():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sampling_logits(logits, temperature=0).softmax(-1).tolist() == [[0, 1, 0]]


def test_uniforms_are_uniform_and_every_key_has_its_own():
    u = uniforms([(s, t, r) for s in range(5) for t in range(5) for r in range(8)], 50, "rollout")
    assert len(u.unique()) > 0.99 * u.numel() and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    assert not torch.equal(uniforms([(1, 2, 3)], 9, "rollout"), uniforms([(1, 2, 3)], 9, "estimate"))
    assert torch.equal(uniforms([(1, 2, 3)], 9, "x"), uniforms([(7, 7, 7), (1, 2, 3)], 30, "x")[1:, :9])


def test_flops_are_what_torch_counts(model):
    """Decode token by token with eager attention under torch's counter: the same matrices, the same causal pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    model.set_attn_implementation("eager")
    P, R = 6, 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        for t in range(P + R - 1):
            inputs = torch.tensor([[t + 3]])
            out = model.base_model(inputs, past_key_values=cache, use_cache=True).last_hidden_state
            if t >= P - 1:
                model.lm_head(out)
    counted = counter.get_total_flops()
    assert sequence_flops(model, torch.tensor([R]), torch.tensor([P])).item() == counted
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("arch, moe", [
    ("Qwen3Moe", dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, head_dim=8)),
    ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
])  # fmt: skip
def test_flops_of_a_mixture_of_experts_are_those_of_the_experts_that_a_token_uses(arch, moe, tmp_path):
    """By hand: 32 wide, 2 layers, 4 heads of 8 and 2 KV heads; a gated expert is three matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, arch=arch, tied=False, **moe))
    width = moe.get("moe_intermediate_size", 64)
    experts = moe.get("num_experts") or moe["num_local_experts"]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + experts * 32 + 2 * 3 * 32 * width  # q, o; k, v; router; two experts
    P, R = 6, 9
    n = P + R - 1
    by_hand = 2 * 2 * layer * n + 4 * n * (n + 1) / 2 * 2 * 4 * 8 + 2 * model.config.vocab_size * 32 * R
    assert sequence_flops(model, torch.tensor([R]), torch.tensor([P])).item() == by_hand
    rollouts = sample(model, PROMPTS, keys_for(PROMPTS), vocab_of(model, [3]), 5)
    assert rollouts.mask.any()
