"""How much memory the Qwen3 recipes need, by arithmetic, and that the table of docs/real_models.md says so.

Weights and cache are counted from the published shapes; activations from what autograd saves in a training forward
pass of the very model at full size, on fake tensors, which have shapes and types and no memory.
"""

import importlib
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from conftest import ROOT, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import opd
from bench.bench import Case, model_config  # the published config.json files, which test_bench.py checks
from plumbing import runs
from plumbing.models import load_model
from plumbing.processes import layers
from plumbing.runs import parse


def config(name):
    return model_config(name, Case("h200", vocab=151_936))


def parameters(name):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(name)).num_parameters()


def cache_bytes(config, rows, tokens):
    """Keys and values of every layer, in bf16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * tokens * 2


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass, each piece of memory counted once, weights not."""

    def __init__(self):
        self.storages = {}
        super().__init__(self.pack, lambda x: x)

    def pack(self, x):
        self.storages[x.untyped_storage()._cdata] = x.untyped_storage()  # kept, so that no address serves twice
        return x

    def bytes(self, model):
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(s.nbytes() for key, s in self.storages.items() if key not in own)


def activation_bytes(config, rows, tokens, checkpointing):
    """-> what a training forward pass of the body keeps in bf16 autocast, and autocast's copies of the weights"""
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        if checkpointing:
            for layer in layers(model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), (saved := Saved()):
            hidden = model.base_model(ids, use_cache=False).last_hidden_state  # held: what it needs is kept
        kept = saved.bytes(model)
        del hidden
    return kept, 2 * sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2)


def test_memory_that_was_freed_is_given_back():
    """200 MB in pieces, with one at the end that stays: glibc keeps all of it until it is asked."""
    code = """
import re, torch
from plumbing.runs import release_memory
rss = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
pieces = [torch.ones(16_000) for _ in range(3_200)]
del pieces[:-1]
kept = rss()
release_memory()
print(kept - rss())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150


def test_a_large_student_gives_memory_back_after_every_step_and_the_toy_does_not(world, tmp_path, monkeypatch):
    for size, calls in ((1e6, 0), (2e7, 2)):
        asked = []
        monkeypatch.setattr(runs, "release_memory", lambda: asked.append(1))
        monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda *args, **options: size)
        run("opd", **world | dict(steps=2), out_dir=tmp_path / str(size))
        assert len(asked) == calls


def test_checkpointing_keeps_less_for_the_backward_pass(world):
    kept = []
    for on in (False, True):
        student = load_model(world["student"], parse(opd.Args, ["--gradient_checkpointing", str(on)]), trainable=True)
        with (saved := Saved()):
            student.base_model(torch.arange(200).view(4, 50), use_cache=False)
        kept.append(saved.bytes(student))
    assert kept[1] < 0.3 * kept[0], kept


def budget(recipe, *more):
    """What `python opd.py --recipe FILE ...` needs at its peak, part by part, for prompts of 128 tokens."""
    args = parse(opd.Args, ["--recipe", str(ROOT / "recipes" / recipe), *more])
    name = args.student.split("Qwen3-")[1].split("-")[0]
    student, tokens = config(name), 128 + args.max_new_tokens
    kept, copies = activation_bytes(student, args.micro_batch_size, tokens, args.gradient_checkpointing)
    if args.gradient_checkpointing:  # one layer at a time is recomputed
        one_layer = config(name)
        one_layer.update(dict(num_hidden_layers=1, layer_types=["full_attention"]))
        kept += activation_bytes(one_layer, args.micro_batch_size, tokens, False)[0]
    always = dict(
        student=16 * parameters(name),  # fp32 weights, gradients, AdamW's two moments
        copies=copies,
        teacher=2 * parameters(args.teacher.split("Qwen3-")[1]),
    )
    in_turn = dict(
        cache=cache_bytes(student, args.batch_size, tokens),
        activations=kept,
        logits=5 * 4 * 2**27,  # two models' logits and log-probabilities, and one more for what comes of them
        evaluation=cache_bytes(student, args.eval_batch_size, 128 + args.eval_max_new_tokens),
    )
    most = max(in_turn["cache"], in_turn["activations"] + in_turn["logits"], in_turn["evaluation"])
    return always | in_turn | dict(total=sum(always.values()) + most)


def test_readme_says_what_the_recipes_need():
    columns = [
        budget("qwen3-4b.txt"),
        budget("qwen3-8b.txt"),
        budget("qwen3-4b.txt", "--max_new_tokens", "4096"),
        budget("qwen3-4b.txt", "--gradient_checkpointing", "false"),
    ]
    rows = re.findall(r"^\| (\w+)[^|]* \|((?: [\d.]+ \|){4})$", (ROOT / "docs" / "real_models.md").read_text(), re.M)
    found = {name: [float(n) for n in numbers.split("|")[:-1]] for name, numbers in rows}
    grpo = parse(importlib.import_module("grpo").Args, ["--recipe", str(ROOT / "recipes/qwen3-grpo.txt")])
    cache = cache_bytes(config("0.6B"), grpo.rollout_batch_size, 128 + grpo.max_new_tokens)
    said = f"needs more, {(columns[0]['student'] + columns[0]['copies'] + cache) / 1e9:.1f}"
    text = " ".join((ROOT / "docs" / "real_models.md").read_text().split())
    assert said in text and f"64 responses of 4,096 tokens at a time, whose cache takes {cache / 1e9:.1f}" in text
    for part in columns[0]:
        assert found[part] == pytest.approx([column[part] / 1e9 for column in columns], abs=0.06), part
