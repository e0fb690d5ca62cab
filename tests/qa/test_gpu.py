"""What only a GPU can show: `pytest -m gpu -s`. Without one, all of it is skipped. (It has not met one yet.)"""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, read_log, run
from test_memory import cache_bytes, model_of, training_bytes
from test_sampling import ARCHITECTURES, build

import opd
from common import check_models, distillation_loss, make_rollouts, reverse_kl, sample
from plumbing.models import cast
from plumbing.processes import shard, start_processes, whole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda"
PROMPTS = [list(range(3, 7 + n % 9)) for n in range(64)]


@pytest.fixture(autouse=True)
def as_in_every_script():
    """Without cuDNN's attention."""
    start_processes()


def toy(role="student", device=DEVICE):
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "toy" / role, dtype=torch.float32).eval().to(device)


def differing(a, b):
    return sum(x != y for x, y in zip(a.responses(), b.responses()))


def test_rollouts_run_compiled_and_are_those_of_a_cpu():
    """Of 64 rollouts two may differ, where rounding decides. A second call replays what the first one recorded."""
    model, half, options = toy(), cast(toy(), "bf16"), dict(end_ids=(0, 2), max_new_tokens=48, entropies=True)
    check_models(model, half)
    assert model.cache_kind == half.cache_kind == "compiled"
    on_cpu = sample(toy(device="cpu"), PROMPTS, temperature=0, **options)
    for cache in ("compiled", "compiled", "dynamic"):
        found = sample(model, PROMPTS, temperature=0, cache=cache, **options)
        assert differing(found, on_cpu) <= 2
        assert found.nats.sum().item() == pytest.approx(on_cpu.nats.sum().item(), rel=0.02)
    compiled, static = (sample(model, PROMPTS, seed=1, cache=cache, **options) for cache in ("compiled", "static"))
    assert differing(compiled, static) <= 2 and differing(compiled, sample(model, PROMPTS, seed=2, **options)) > 20
    nats = [sample(m, PROMPTS, (), 1, entropies=True).nats for m in (model, half)]
    torch.testing.assert_close(*nats, rtol=0.05, atol=0.05)


def test_a_window_that_slides_is_not_compiled():
    """transformers counts its tokens by an int of Python, which would be compiled anew at every step."""
    model = build("gemma2", **ARCHITECTURES["gemma2"]).to(DEVICE)
    check_models(model)
    assert getattr(model, "cache_kind", "dynamic") == "dynamic"


def test_a_script_trains_saves_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the toy is
    arguments = dict(batch_size=16, micro_batch_size=5, eval_k=1, eval_every=0, lr=1e-4, precision="bf16")
    arguments |= dict(gradient_checkpointing=True)
    for steps, out_dir in ((4, "whole"), (2, "cut"), (4, "cut")):
        run("opd", **arguments, steps=steps, out_dir=tmp_path / out_dir)
    whole_run, cut = (read_log(tmp_path / name) for name in ("whole", "cut"))
    assert len(cut) == 5 and all(row["grad_norm"] > 0 for row in cut[1:])
    for name in ("loss", "entropy", "response_len"):
        assert [row[name] for row in cut[1:]] == pytest.approx([row[name] for row in whole_run[1:]], rel=0.05)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [192, 201, 229])
def test_loss_and_gradient_are_finite_and_those_of_a_cpu(length, half):
    """Rows of unlike lengths with T % 128 = 64, where a kernel has given NaN; plain, and sharded over one process."""
    ids, results = [i % 20 + 3 for i in range(length)], []
    for device, sharded in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        student, teacher = toy(device=device), toy("teacher", device)
        student.autocasts = half and device != "cpu"
        if sharded:
            dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
            student = shard(student)
        batch = make_rollouts([ids[:7], ids[:2]], [ids[7:], ids[:40]], [False] * 2, device)
        loss, _ = distillation_loss(reverse_kl, student, teacher, batch, batch.mask / batch.mask.sum())
        loss.backward()
        results.append((loss.item(), torch.cat([whole(p.grad).flatten().cpu() for p in student.parameters()])))
        if sharded:
            dist.destroy_process_group()
    (expected, grads), *others = results
    for found, found_grads in others:
        assert found == pytest.approx(expected, rel=0.02 if half else 1e-4)
        assert found_grads.isfinite().all() and (found_grads - grads).norm() < (0.1 if half else 1e-3) * grads.norm()


def test_a_step_takes_the_memory_that_the_documents_say_and_what_a_decode_step_costs():
    """At the size of Qwen3-0.6B. The milliseconds are printed, and nothing is asserted about them."""
    args = opd.Args(student="0.6B", teacher="4B", micro_batch_size=4, gradient_checkpointing=False)
    with torch.device(DEVICE):
        student, teacher = model_of("0.6B").eval(), model_of("4B", torch.bfloat16, 1).requires_grad_(False).eval()
    sampler, prompts = cast(copy.deepcopy(student).requires_grad_(False), "bf16"), [list(range(3, 131))] * 32
    for cache in ("dynamic", "static", "compiled"):
        before = torch.cuda.memory_allocated()
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            rollouts = sample(sampler, prompts, (), 1024, cache=cache)
            milliseconds = 1000 * (time.perf_counter() - start) / 1024
        print(f"\n{cache}: {milliseconds:.2f} ms a step of 32 rows", end="")
        if cache == "static":
            assert torch.cuda.memory_allocated() - before == pytest.approx(cache_bytes(32, 1024), rel=0.02)
    student.autocasts, batch = True, next(rollouts.split(4))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    distillation_loss(reverse_kl, student, teacher, batch, batch.mask / batch.mask.sum())[0].backward()
    peak, expected = torch.cuda.max_memory_allocated() - before, training_bytes(args, 1152, 28)
    print(f"; training takes {peak / 1e9:.1f} GB, and {expected / 1e9:.1f} were expected")
    assert peak == pytest.approx(expected, rel=0.15)
