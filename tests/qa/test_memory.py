"""How much memory the Qwen3 recipes need, and that docs/real_models.md says so. Weights and caches are counted from the
published shapes. What training takes is measured: the scripts' code runs on fake tensors, which have no memory."""

import functools
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import common
import opd
import plumbing.run
from plumbing.arguments import parse
from plumbing.models import autocast
from plumbing.processes import body, layers

# The published config.json files: hidden, intermediate, layers, heads, tied
QWEN3 = {"0.6B": (1024, 3072, 28, 16, True), "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False)}
PROMPT = 128  # tokens


def model_of(path, dtype=torch.float32, depth=0):
    hidden, inner, layers, heads, tied = QWEN3[re.search(r"[\d.]+B", path)[0]]
    options = dict(num_hidden_layers=depth or layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128)
    options |= dict(vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**options), dtype=dtype)


class Alive(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made and still there; `known` are those from before."""

    def __init__(self, known):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, weakref.WeakSet(x.untyped_storage() for x in known)

    def add(self, n):
        self.bytes += n
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


def training_bytes(args, tokens, depth):
    """What the loss of a micro-batch and its backward pass need at their peak, beside weights and gradients."""

    def response_hidden(model, batch):  # as in common.py, but for prompts of one length: fake tensors have no mask
        with autocast(model):
            return body(model)(input_ids=batch.ids).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "response_hidden", response_hidden)
        models = student, teacher = model_of(args.student, depth=depth), model_of(args.teacher, torch.bfloat16, 1)
        student.autocasts, student.config.use_cache, teacher.config.use_cache = True, False, False
        for layer in layers(student) if args.gradient_checkpointing else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [x for model in models for x in (*model.parameters(), *model.buffers())]
        batch = SimpleNamespace(ids=torch.zeros(args.micro_batch_size, tokens, dtype=torch.long), mask=0)
        weights = {0: torch.ones(args.micro_batch_size * (tokens - PROMPT))}
        with Alive([*known, *(p.grad for p in student.parameters())]) as alive:
            chunk = 2**25 // len(student.lm_head.weight)  # as on a GPU
            loss, _ = common.distillation_loss(common.reverse_kl, student, teacher, batch, weights, chunk=chunk)
            loss.backward()
    return alive.peak


def cache_bytes(rows, new):
    """Keys and values of all layers of Qwen3-0.6B in bf16, in a cache of fixed size."""
    return 2 * 28 * 8 * 128 * rows * (PROMPT + new) * 2


def budget(recipe, *more):
    """What `python opd.py --recipe FILE ...` needs at its peak on a GPU, part by part, in GB."""
    args = parse(opd.Args, ["--recipe", str(ROOT / "recipes" / recipe), *more])
    with torch.device("meta"):
        student, teacher = (model_of(path).num_parameters() for path in (args.student, args.teacher))
    parts = dict(student=16 * student, copy=2 * student, teacher=2 * teacher)  # 16: weights, gradients, two moments
    parts["rollouts"] = cache_bytes(args.batch_size, args.max_new_tokens)
    parts["evaluation"] = cache_bytes(args.eval_batch_size, args.eval_max_new_tokens)
    one, two = (training_bytes(args, PROMPT + args.max_new_tokens, depth) for depth in (1, 2))
    parts["training"] = one + 27 * (two - one)  # 28 layers, all alike
    return {name: n / 1e9 for name, n in (parts | dict(total=sum(parts.values()))).items()}


def test_the_documents_say_what_the_recipes_need():
    changed = ("--max_new_tokens", "4096"), ("--gradient_checkpointing", "false")
    columns = [budget("qwen3-4b.txt"), budget("qwen3-8b.txt"), *(budget("qwen3-4b.txt", *more) for more in changed)]
    text = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)[^|]* \|((?: [\d.]+ \|){4})$", text, re.M)
    found = {name: [float(n) for n in numbers.split("|")[:-1]] for name, numbers in rows}
    for part in columns[0]:
        assert found[part] == pytest.approx([column[part] for column in columns], abs=0.06), part
    long, cache = columns[2], cache_bytes(64, 4096) / 1e9
    grpo = long["total"] - long["teacher"] - long["rollouts"] + cache
    says = f"a cache of {cache:.1f} for 64 responses of 4,096 tokens at a time, and {grpo:.1f} in all"
    assert says in " ".join(text.split())


def test_memory_that_was_freed_is_given_back():
    """200 MB in pieces, with one at the end that stays: glibc keeps all of it until it is asked."""
    code = """
import re, torch
from plumbing.run import release_memory
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
pieces = [torch.ones(16_000) for _ in range(3_200)]
del pieces[:-1]
print(resident(), release_memory(), resident())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, _, left = done.stdout.split()
    assert int(kept) - int(left) > 150


@pytest.mark.parametrize("size, times", [(1e6, 0), (2e7, 2)])
def test_a_large_student_gives_memory_back_after_every_step_and_the_toy_does_not(
    size, times, world, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(plumbing.run, "release_memory", lambda: asked.append(1))
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda *args, **options: size)
    run("opd", **world | dict(steps=2, precision="fp32", eval_data="none"), out_dir=tmp_path)
    assert len(asked) == times
