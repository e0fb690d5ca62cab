"""What only a GPU can show: `pytest -m gpu -s`. Without one, all of it is skipped. (It has not met one yet.)

In order: the recorded decode step draws what a CPU draws, half precision runs, a whole script trains, is saved and goes
on; the loss is finite where attention kernels are said to have been wrong; a sharded model of one process samples and
learns. The last test prints what a decode step costs, and asserts nothing about it. What a whole step of 0.6B <- 4B
costs, and its peak of memory: `python bench/bench.py --preset h200`.
"""

import copy
import json
import time

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, read_log, run
from test_reliability import Killed, die_at

import opd
from bench.bench import Case, model_config
from common import draw, make_rollouts, reverse_kl, sample, weighted_kl
from plumbing import fast, processes
from plumbing.fast import autocast
from plumbing.models import Vocab

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PROMPTS = [tuple(range(3, 7 + n % 9)) for n in range(64)]
KEYS = [(0, 1, i) for i in range(64)]


@pytest.fixture(autouse=True)
def as_in_every_script():
    """Without cuDNN's attention."""
    processes.start_processes()


def toy(role="student", device="cuda"):
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "toy" / role, dtype=torch.float32).eval().to(device)


def vocab_of(model):
    return Vocab(model.config.vocab_size, (0, 2), 0)


def differing(a, b):
    return sum(x != y for x, y in zip(a.responses(), b.responses()))


@pytest.mark.parametrize("block", [256, 8])
def test_rollouts_on_a_cpu_by_graph_and_without_are_the_same(block, monkeypatch):
    """fp32: of 64 rollouts, one may differ, where a uniform number falls on the seam between two tokens."""
    monkeypatch.setattr(fast.FixedCache, "block", block)
    model = toy()
    on_cpu = sample(toy(device="cpu"), PROMPTS, KEYS, vocab_of(model), 48, entropies=True)
    by_graph = sample(model, PROMPTS, KEYS, vocab_of(model), 48, entropies=True, cache="fixed")
    growing = sample(model, PROMPTS, KEYS, vocab_of(model), 48, cache="growing")
    assert fast.decoder_for(model, "auto") is fast.FixedCache
    assert differing(on_cpu, by_graph) <= 1 and differing(by_graph, growing) <= 1


def test_graphs_are_recorded_on_the_models_own_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = toy(device="cuda:1")
    assert differing(sample(model, PROMPTS, KEYS, vocab_of(model), 48), sample(toy(), PROMPTS, KEYS, vocab_of(model), 48)) <= 1


@pytest.mark.parametrize("cache", ["growing", "fixed"])
def test_half_precision_rollouts(cache):
    model = toy()
    exact = sample(model, PROMPTS, KEYS, vocab_of(model), 24, entropies=True)
    model.autocasts = True
    rollouts = sample(model, PROMPTS, KEYS, vocab_of(model), 24, entropies=True, cache=cache)
    torch.testing.assert_close(rollouts.entropy[:, 0], exact.entropy[:, 0], rtol=0.05, atol=0.05)


def test_a_script_trains_saves_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the toy is
    arguments = dict(steps=4, save_every=2, batch_size=16, micro_batch_size=5, eval_k=1, eval_every=0, lr=1e-4)
    arguments |= dict(gradient_checkpointing=True)
    run("opd", **arguments, out_dir=tmp_path / "whole")
    rows = read_log(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/args.json").read_text())["precision"] == "bf16"
    assert len(rows) == 5 and all(row["grad_norm"] > 0 for row in rows[1:])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, opd, "sample", 4, before=True)
        run("opd", **arguments, out_dir=tmp_path / "cut")
    run("opd", **arguments, out_dir=tmp_path / "cut")
    for row, expected in zip(read_log(tmp_path / "cut"), rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.05) if "loss" in row else True


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [192, 201, 229])
def test_loss_and_gradient_are_finite_and_those_of_a_cpu(length, half):
    """Rows of different lengths with T % 128 = 64, where a kernel has given NaN for rows that see nothing."""
    student, teacher = toy(), toy("teacher")
    vocab = vocab_of(student)
    tokens = torch.arange(length) % (vocab.size - 3) + 3
    prompts, responses = [(3, 4, 5, 6, 7, 8, 9), (5, 6)], [tuple(tokens[: length - 7].tolist()), tuple(tokens[:40].tolist())]
    results = []
    for device in ("cpu", "cuda:0"):
        pair = [copy.deepcopy(m).to(device) for m in (student, teacher)]
        pair[0].autocasts = half and device != "cpu"
        batch = make_rollouts(prompts, responses, [False] * 2, KEYS[:2], vocab, device)
        loss, _ = weighted_kl(reverse_kl, *pair, batch, batch.mask / batch.mask.sum(), vocab)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in pair[0].parameters()])))
    (expected, grads), (found, found_grads) = results
    assert found == pytest.approx(expected, rel=0.02 if half else 1e-4)
    assert found_grads.isfinite().all() and (found_grads - grads).norm() < (0.1 if half else 1e-3) * grads.norm()


def test_a_sharded_model_samples_and_learns():
    """A world of one: FSDP2's hooks, without the others."""
    plain, teacher = toy(), toy("teacher")
    rollouts = sample(plain, PROMPTS, KEYS, vocab_of(plain), 24)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    try:
        model = processes.shard(toy())
        assert fast.decoder_for(model, "auto") is fast.GrowingCache
        sharded = sample(model, PROMPTS, KEYS, vocab_of(plain), 24)
        assert differing(rollouts, sharded) <= 1
        losses = []
        for student in (plain, model):
            loss, _ = weighted_kl(reverse_kl, student, teacher, rollouts, rollouts.mask / rollouts.mask.sum(), vocab_of(plain))
            loss.backward()
            losses.append((loss.item(), sum(processes.full(p.grad).square().sum() for p in student.parameters()).item()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    finally:
        dist.destroy_process_group()


def test_what_a_decode_step_costs():
    """Printed, in ms: Qwen3-0.6B's shape, 32 rows, bf16, eagerly and as a graph, at two widths of the cache."""
    config = model_config("0.6B", Case("h200", vocab=151_936))
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.autocasts, vocab, ids = True, Vocab(151_936, (), 0), torch.ones(32, dtype=torch.long, device="cuda")

    def milliseconds(f, n=20):
        for _ in range(4):
            f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            f()
        torch.cuda.synchronize()
        return round(1e3 * (time.perf_counter() - start) / n, 2)

    for prompt in (896, 3968):  # 1,152 and 4,224 columns
        rows = [tuple(range(3, 3 + prompt))] * 32
        start = make_rollouts(rows, [()] * 32, [False] * 32, [(0, 0, i) for i in range(32)], vocab, "cuda")
        with torch.no_grad(), autocast(model):
            decoder = fast.FixedCache(model, start)
            decoder.step()
            eager = milliseconds(decoder._read, 10)
            graph = milliseconds(lambda: decoder.step(ids))
            head = fast.Head(model, vocab)
            drawing = milliseconds(lambda: draw(head(decoder.hidden).softmax(-1), torch.rand(32, device="cuda")))
        print(f"\n{prompt + 256} columns: eager {eager} ms, graph {graph} ms; head and draw {drawing} ms")
        assert decoder.graph is not None and decoder.hidden.isfinite().all()
