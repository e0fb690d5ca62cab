"""How much memory the Qwen3 recipes need, by arithmetic, and that README's table says so.

Weights and cache are counted from the published shapes; activations from what autograd saves in a training forward
pass of the very model at full size, on fake tensors, which have shapes and types and no memory.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import opd
from plumbing.processes import layers
from plumbing.runs import parse

sys.path.insert(0, str(ROOT / "bench"))
from bench import Case, model_config  # noqa: E402  the published config.json files

GB = 1e9
V = 151_936


def config(name):
    case = Case("h200", V, name, name, 1, 1, 1, 1, False, "cpu", True, 1, 1, 0)
    return model_config(name, case)


def parameters(name):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(name)).num_parameters()


def cache_bytes(config, rows, tokens, element=2):
    """Keys and values of every layer."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * tokens * element


class Saved:
    """Bytes that autograd keeps for the backward pass, each piece of memory counted once, weights not."""

    def __enter__(self):
        self.storages, self.weights = {}, set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, x):
        self.storages[x.untyped_storage()._cdata] = x.untyped_storage()  # kept, so that no address serves twice
        return x

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def bytes(self, model):
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(s.nbytes() for key, s in self.storages.items() if key not in own)


def activation_bytes(config, rows, tokens, checkpointing):
    """What a training forward pass of the body keeps, in bf16 autocast over fp32 weights."""
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        if checkpointing:
            for layer in layers(model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), Saved() as saved:
            hidden = model.base_model(ids, use_cache=False).last_hidden_state
        kept = saved.bytes(model)
        copies = 2 * sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2)
        del hidden
    return kept, copies


@dataclass
class Budget:
    student: float  # fp32 weights, gradients, AdamW's two moments
    copies: float  # bf16 copies of the matrices that autocast makes
    teacher: float  # bf16 weights
    cache: float  # KV cache while sampling
    activations: float  # of a micro-batch, between forward and backward pass
    logits: float  # vocabulary-sized fp32 tensors of one chunk
    evaluation: float  # KV cache while evaluating

    @property
    def total(self):
        """Sampling, training and evaluating take turns."""
        turns = (self.cache, self.activations + self.logits, self.evaluation)
        return self.student + self.copies + self.teacher + max(turns)


def test_the_cache_formula_is_what_a_cache_takes():
    from transformers import DynamicCache

    small = config("0.6B")
    small.update(dict(num_hidden_layers=3, hidden_size=64, intermediate_size=64, vocab_size=100))
    model = transformers.AutoModelForCausalLM.from_config(small)
    cache = DynamicCache(config=small)
    model(torch.zeros(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert taken == cache_bytes(small, 2, 7, element=4)


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
    return Budget(
        student=16 * parameters(name),
        copies=copies,
        teacher=2 * parameters(args.teacher.split("Qwen3-")[1]),
        cache=cache_bytes(student, args.batch_size, tokens),
        activations=kept,
        evaluation=cache_bytes(student, args.eval_batch_size, 128 + args.eval_max_new_tokens),
        logits=5 * 4 * 2**27,  # two models' logits and log-probabilities, and one more for what comes of them
    )


COLUMNS = {
    "4B": ("qwen3-4b.txt",),
    "8B": ("qwen3-8b.txt",),
    "4B, 4,096 tokens": ("qwen3-4b.txt", "--max_new_tokens", "4096"),
    "4B, no checkpointing": ("qwen3-4b.txt", "--gradient_checkpointing", "false"),
}


@pytest.fixture(scope="module")
def budgets():
    return {name: budget(*arguments) for name, arguments in COLUMNS.items()}


def test_readme_says_what_the_recipes_need(budgets):
    rows = re.findall(r"^\| (\w+)[^|]* \|((?: [\d.]+ \|){4})$", (ROOT / "README.md").read_text(), re.M)
    found = {name: [float(n) for n in numbers.split("|")[:-1]] for name, numbers in rows}
    for part in ("student", "copies", "teacher", "cache", "activations", "logits", "evaluation", "total"):
        expected = [getattr(b, part) / GB for b in budgets.values()]
        assert found[part] == pytest.approx(expected, abs=0.06), part


def test_parts_are_of_the_right_size(budgets):
    b = budgets["4B"]
    assert b.student == 16 * 596_049_920  # Qwen3-0.6B: the published number of parameters
    assert b.teacher == 2 * 4_022_468_096  # Qwen3-4B
    assert b.cache == 32 * (128 + 1024) * 114_688  # 112 KiB a token
    assert b.activations < 0.15 * budgets["4B, no checkpointing"].activations
