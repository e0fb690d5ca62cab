"""The path that only a GPU takes, on a pretended one (pretend_gpu.py): what would crash there crashes here."""

import copy
import importlib

import pytest
import torch
from conftest import SCRIPTS, arguments_of, even_length, read_log, run
from pretend_gpu import Graph, pretended, record
from test_gpu import (  # noqa: F401  run here, too, so that what fails on the first GPU is not the test
    test_graphs_are_recorded_on_the_models_own_device,
    test_half_precision_rollouts,
    test_loss_and_gradient_are_finite_and_those_of_a_cpu,
    test_rollouts_on_a_cpu_by_graph_and_without_are_the_same,
)
from test_reliability import Killed, die_at
from test_sampling import any_model, many  # noqa: F401  a fixture

from bench import bench
from common import sample
from plumbing import fast, models
from plumbing.runs import Run

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(models, "device_here", lambda: GPU)
    monkeypatch.setattr(fast.FixedCache, "block", 8)
    with pretended(monkeypatch) as gpu:
        yield gpu


def test_a_recorded_step_draws_what_a_cpu_draws_and_waits_for_nothing(any_model, gpu, monkeypatch):  # noqa: F811
    """Rows end, the cache grows and moves to fewer rows; after either the step is recorded anew."""
    waits, step = [], fast.FixedCache.step

    def counted(self, y=None):
        before = gpu.waits
        hidden = step(self, y)
        waits.append(gpu.waits - before if self.graph else 0)
        return hidden

    monkeypatch.setattr(fast.FixedCache, "step", counted)
    prompts, keys, vocab = many(any_model)
    expected = sample(any_model, prompts, keys, vocab, 30, cache="growing")
    found = sample(copy.deepcopy(any_model).to(GPU), prompts, keys, vocab, 30)
    assert found.ids.device == GPU and found.responses() == expected.responses()
    assert gpu.replays > 12 and sum(waits) == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_and_is_saved(script, world, tmp_path, gpu, monkeypatch):
    loaded, load = [], Run.load
    monkeypatch.setattr(Run, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    if script == "grpo":
        monkeypatch.setattr(importlib.import_module(script), "grade", even_length)
    options = dict(steps=1, precision="bf16", gradient_checkpointing=True, lengths="12", ends="as_one")
    arguments = arguments_of(script, world, **options, estimator="sampled", max_new_tokens=12)
    run(script, **arguments, out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run")
    assert gpu.replays > 4 and all(row["grad_norm"] > 0 for row in rows[1:])
    assert {model.device for model in loaded} == {GPU} and (tmp_path / "run/model/model.safetensors").exists()


STEPS_OF_12_TOKENS = dict(max_new_tokens=12, precision="fp32", save_every=1)


@pytest.fixture(scope="module")
def on_cpu(world, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("cpu")
    run("opd", **world | STEPS_OF_12_TOKENS, out_dir=out_dir)
    return read_log(out_dir)


@pytest.mark.parametrize("teacher_device", ["", "cpu", "cuda:1"])
def test_a_run_is_a_cpu_s_wherever_its_teacher_is_and_goes_on(teacher_device, on_cpu, world, tmp_path, gpu, monkeypatch):
    arguments = world | STEPS_OF_12_TOKENS | dict(teacher_device=teacher_device, out_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, torch.nn.utils, "clip_grad_norm_", 3, before=True)
        run("opd", **arguments)
    run("opd", **arguments)
    for row, expected in zip(read_log(tmp_path), on_cpu, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert gpu.replays > 10


def test_so_runs_the_bench(gpu):
    small = bench.resolved(bench.Case("h200", device="cuda:0", shrink=True, max_new_tokens=20, steps=1))
    assert bench.measure("ours", small)["loss"] > 0 and gpu.replays > 10


def test_products_of_half_precision_are_added_up_in_fp32(gpu):
    a = torch.full((1, 300), 1.01, dtype=torch.bfloat16, device=GPU)
    product = fast._matmul(a, a.T)
    assert product.dtype == torch.float32 and product.item() != product.bfloat16().item()


def test_what_a_gpu_refuses_is_refused(gpu):
    a, graph = torch.zeros(3, device=GPU), Graph()
    for wrong in (lambda: a + torch.ones(3), lambda: a + a.to("cuda:1"), lambda: torch.stack([a, torch.ones(3)])):
        with pytest.raises(RuntimeError, match="operands on"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()
    for wrong in (lambda: a.sum().item(), lambda: a[a > 0], lambda: a.copy_(torch.ones(3)), a.cpu, lambda: bool(a[0])):
        with pytest.raises(RuntimeError, match="while a graph is recorded"), record(Graph(), None):
            wrong()
    with record(graph, None):
        b = 2 * a.add_(1)
    assert a.tolist() == [0, 0, 0], "a recording runs nothing"
    graph.replay()
    graph.replay()
    assert a.tolist() == [2, 2, 2] and b.tolist() == [4, 4, 4]
    c = a + 1
    assert c.device == GPU and c.cpu().device.type == "cpu" and (torch.tensor(1.0) + c).tolist() == [4, 4, 4]
