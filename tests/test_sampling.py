"""Sampling: the stated distribution, the right ends, and with every cache the tokens and logits of the model itself."""

import copy
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SCRIPTS, arguments_of, read_log, run, write_jsonl
from torch.utils.flop_counter import FlopCounterMode

import common
import opd
from common import sample
from plumbing.models import load_student, refresh, sequence_flops

PROMPTS = [[*range(5 + 3 * i, 6 + 3 * i + 5 * i % 9), 0] for i in range(16)]  # of 2 to 10 tokens; 0 is padding, too
ENDS = (0, 3, 4, 11, 17, 30, 31, 32, 40, 41)  # random models say one of them after 1 to 30 tokens
UNTIED = dict(tie_word_embeddings=False)
ARCHITECTURES = {  # what differs in a cache: norms of keys, biases, soft caps, windows shorter than the sequences
    "qwen3": dict(tie_word_embeddings=True),
    "qwen3-untied": UNTIED,
    "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "llama": UNTIED,
    "gemma2": UNTIED | dict(sliding_window=6, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma3_text": UNTIED | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "mistral": dict(sliding_window=5),
}


def build(kind, **config):
    """A tiny random model of any architecture."""
    sizes = dict(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    if kind in ("bloom", "gpt2"):  # where it is a property
        del sizes["head_dim"]
    torch.manual_seed(0)
    attention = "eager" if "attn_logit_softcapping" in config else None
    config = transformers.CONFIG_MAPPING[kind.split("-u")[0]](**sizes | config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(model, path):
    """Its checkpoint, with a hostile generation_config, as Qwen3's own is. -> str(path)"""
    model.save_pretrained(path)
    hostile = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.3, eos_token_id=[1, 2])
    Path(path, "generation_config.json").write_text(json.dumps(hostile), encoding="utf-8")
    Path(path, "tokenizer.json").touch()  # not read here
    return str(path)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_model(request):
    return build(request.param, **ARCHITECTURES[request.param])


@torch.no_grad()
def anew(model, prompts, end_ids, new, temperature=1.0, seed=0, batch_size=None, leave=True):
    """The plainest sampler: each row alone, without padding or cache, all of it read anew for every token. At every
    step each row that is still in the batch takes the next number of one generator, by inverse CDF.
    -> responses, whether they ended, Σ entropy. leave: rows that have ended are no longer in the batch."""
    generator, n = torch.Generator().manual_seed(seed), batch_size or len(prompts)
    responses, nats, ended = [[] for _ in prompts], [0.0 for _ in prompts], [False for _ in prompts]
    for step in range(-(-len(prompts) // n) * new):
        batch = range(step // new * n, step // new * n + n)  # a batch after the other; dummies fill up the last one
        rows = [i for i in batch if not leave or i < len(prompts) and not ended[i]]
        u = torch.rand(len(rows), dtype=torch.float64, generator=generator) if temperature and rows else rows
        for i, number in zip(rows, u):
            if i < len(prompts) and not ended[i]:
                logits = model(input_ids=torch.tensor([prompts[i] + responses[i]])).logits[0, -1].double()
                p, scaled = logits.softmax(-1), (logits / (temperature or 1)).softmax(-1)
                nats[i] -= torch.special.xlogy(p, p).sum().item()
                y = (scaled.cumsum(-1) <= number).sum() if temperature else logits.argmax()
                responses[i].append(y.item())
                ended[i] = y.item() in end_ids
    return responses, ended, nats


def assert_same(rollouts, expected):
    responses, ended, nats = expected
    assert rollouts.responses() == responses and rollouts.ended.tolist() == ended
    torch.testing.assert_close(rollouts.nats, torch.tensor(nats), rtol=1e-5, atol=1e-5)


FILTERS = [(1.0, 1.0, 0, None), (0.5, 1.0, 0, None), (1.0, 0.8, 0, 50), (1.0, 1.0, 7, None), (2.0, 0.9, 20, 40)]


@pytest.mark.parametrize("temperature, top_p, top_k, vocab_size", FILTERS)
def test_what_is_sampled_is_the_stated_distribution(temperature, top_p, top_k, vocab_size, tmp_path):
    """Chi-square over 4,000 one-token rollouts: T, top_p, top_k and crop are the arguments', not the checkpoint's."""
    n, path = 4000, saved(build("qwen3"), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    rollouts = sample(model, [PROMPTS[1]] * n, (), 1, temperature, top_p, top_k, seed=1, vocab_size=vocab_size)
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[1]])).logits[0, -1, :vocab_size].double() / temperature).softmax(-1)
    p, order = expected.sort(descending=True)
    p = p[: top_k or None] / p[: top_k or None].sum()
    p = p * (p.cumsum(-1) - p < top_p)  # the smallest set whose probability is top_p
    expected = torch.zeros_like(expected).index_copy(0, order[: len(p)], p / p.sum())
    counts = torch.bincount(rollouts.ids[:, -1], minlength=len(expected)).double()
    assert len(counts) == len(expected) and counts[expected == 0].sum() == 0
    big = expected * n >= 5  # the rest goes into one bin
    counts, wanted = (torch.cat([x[big], x[~big].sum()[None]]) for x in (counts, expected * n))
    chi2, freedom = ((counts - wanted) ** 2 / wanted)[wanted > 0].sum().item(), (wanted > 0).sum().item() - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {chi2:.0f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("temperature, batch_size", [(0.7, None), (0.7, 5), (0, 5)])
def test_rows_that_end_leave_and_the_others_go_on_as_if_alone(any_model, temperature, batch_size):
    options = dict(temperature=temperature, seed=2, batch_size=batch_size)
    rollouts = sample(any_model, PROMPTS, ENDS, 30, entropies=True, **options)
    assert len(set(map(len, rollouts.responses()))) > 3 and 0 < rollouts.ended.sum()
    assert_same(rollouts, anew(any_model, PROMPTS, ENDS, 30, **options))
    assert rollouts.flops == sequence_flops(any_model, *rollouts.lengths())
    assert rollouts.lengths()[1].tolist() == list(map(len, PROMPTS))


@pytest.mark.parametrize("end_ids, batch_size", [((), 6), (ENDS, 20)])
def test_a_static_cache_draws_what_the_model_says_filled_up_by_dummies(any_model, end_ids, batch_size):
    """Batches of 6, 6 and 4 rows, the last one filled up, in one cache: it must have been emptied in between."""
    options = dict(seed=3, batch_size=batch_size)
    rollouts = sample(any_model, PROMPTS, end_ids, 20, entropies=True, cache="static", prompt_len=12, **options)
    assert_same(rollouts, anew(any_model, PROMPTS, end_ids, 20, leave=False, **options))
    assert list(any_model.static_caches) == [(batch_size, 32)]
    any_model.static_caches.clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_changes_logits_by_rounding_only(any_model, precision, cache, tmp_path):
    """In fp32 to 1e-5; the copy in bf16 is as far from exact arithmetic with a cache as without."""
    _, model = load_student(opd.Args(student=saved(any_model, tmp_path), precision=precision))
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output.logits[:, -1].float()))
    rollouts = sample(model, PROMPTS, (), 20, cache=cache)
    hook.remove()
    found, logits = torch.stack(seen, 1), []  # (B, 20, V)
    for one in (model, copy.deepcopy(model).float()):
        with torch.no_grad():
            rows = [one(ids[None, : len(p) + 20]).logits[0, len(p) - 1 : -1] for ids, p in zip(rollouts.ids, PROMPTS)]
        logits.append(torch.stack(rows).float())
    own, exact = logits
    bound = 1e-5 * exact.norm() if precision == "fp32" else 1.2 * (own - exact).norm()
    assert (found - exact).norm() <= bound and (own - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_that_samples_in_bf16_follows_the_student_in_place(tied, tmp_path):
    """Its parameters are rounded, its buffers are not: positions would be wrong by far in a long text."""
    path = saved(build("qwen3", tie_word_embeddings=tied), tmp_path)
    student, sampler = load_student(opd.Args(student=path, precision="bf16", gradient_checkpointing=True))
    addresses = [p.data_ptr() for p in sampler.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        refresh(sampler, student)
        a, b = (model(torch.arange(3, 60)[None]).logits for model in (sampler, student))
    assert a.dtype == torch.bfloat16 and (a - b).norm() < 0.03 * b.norm()
    assert_rounded(sampler, student)
    assert [p.data_ptr() for p in sampler.parameters()] == addresses and not any(
        p.requires_grad for p in sampler.parameters()
    )
    assert (sampler.lm_head.weight is sampler.get_input_embeddings().weight) == tied
    buffers = list(zip(sampler.buffers(), student.buffers(), strict=True))
    assert buffers and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in buffers)
    student, sampler = load_student(opd.Args(student=path, precision="fp32"))
    assert sampler is student


def assert_rounded(sampler, student):
    for mine, parameter in zip(sampler.parameters(), student.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, parameter.bfloat16())


MOE = UNTIED | dict(num_experts_per_tok=2, experts_implementation="eager")
QWEN3_MOE = MOE | dict(num_experts=8, moe_intermediate_size=24, decoder_sparse_step=1)
MODELS = {"qwen3": {}, "llama": UNTIED, "mixtral": MOE | dict(num_local_experts=4), "qwen3_moe": QWEN3_MOE}


@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_what_torch_counts(kind):
    """Reading token by token, with eager attention: the same matrices, experts that are used, and causal pairs."""
    model, P, R = build(kind, **MODELS[kind]), 6, 9
    model.set_attn_implementation("eager")
    cache = transformers.DynamicCache(config=model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for t in range(P + R - 1):
            out = model.base_model(torch.tensor([[t + 3]]), past_key_values=cache, use_cache=True).last_hidden_state
            if t >= P - 1:
                model.lm_head(out)
    count = lambda *lengths: sequence_flops(model, *map(torch.tensor, lengths))
    assert count([R], [P]) == counter.get_total_flops() and count([R, 1], [P, 3]) == count([R], [P]) + count([1], [3])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_samples_in_bf16_is_the_student_of_this_step_rounded(script, world, tmp_path, monkeypatch):
    """In rollouts and evaluations, and in a run that goes on."""
    module, pair, decode = importlib.import_module(script), [], common._decode

    def watched(model, *args):
        assert model is pair[-1][1]
        assert_rounded(model, pair[-1][0])
        return decode(model, *args)

    monkeypatch.setattr(common, "_decode", watched)
    monkeypatch.setattr(module, "load_student", lambda args: pair.append(load_student(args)) or pair[-1])
    monkeypatch.setattr(module, "check_models", lambda *models: None)
    for steps in (2,) if script == "curriculum" else (2, 3):
        options = dict(steps=steps, eval_every=1, precision="bf16", lengths=2)
        run(script, **arguments_of(script, world, **options), out_dir=tmp_path)


@pytest.mark.parametrize("n_sets", [1, 2])
def test_a_run_with_static_caches_is_that_with_dynamic_ones_and_has_two_of_them(n_sets, world, tmp_path, monkeypatch):
    """Of the same sizes at every step and for every set, as a GPU records and keeps each of them. With one token a
    rollout no row leaves, and both caches draw alike."""
    short = write_jsonl(tmp_path / "short.jsonl", [{"question": "1?", "answer": "1"}])
    arguments = world | dict(max_new_tokens=1, eval_temperature=0, eval_batch_size=2, eval_every=1)
    arguments["eval_data"] = ",".join([world["eval_data"], short][:n_sets])
    run("opd", **arguments, out_dir=tmp_path / "dynamic")
    static = dict(cache_kind="static", static_caches={})
    monkeypatch.setattr(opd, "check_models", lambda student, sampler, teacher: vars(sampler).update(static))
    run("opd", **arguments, out_dir=tmp_path / "static")
    for a, b in zip(read_log(tmp_path / "static"), read_log(tmp_path / "dynamic"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert sorted(rows for rows, _ in static["static_caches"]) == [2, 4]
