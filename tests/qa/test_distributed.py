"""One, two and four processes, and two with the variables of two nodes, do the same: rollouts, loss, gradient, evaluation; states move."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import distributed_worker
import pytest
import torch
import transformers
from conftest import ROOT, SCRIPTS, arguments_of, even_length, make_checkpoint, read_log, run
from torch.distributed.elastic.utils.distributed import get_free_port

from plumbing import processes

WORKER = str(ROOT / "tests/qa/distributed_worker.py")

# Importing torch and transformers is most of what a short-lived process does: import them once, then fork.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["distributed_worker"])
# Where the server, which is not pytest's child, finds it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/qa"), str(ROOT / "tests")])


def start(world, jobs, tmp_path, nodes=1):
    """The worker in `world` processes, with the environment that torchrun gives them. -> [(process, its log file)]"""
    port, started = str(get_free_port()), []
    for rank in range(world):
        log = tmp_path / f"{world}-{port}-{rank}.log"
        of_group = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment = of_group | dict(RANK=rank, LOCAL_RANK=rank % (world // nodes))
        process = FORK.Process(target=distributed_worker.work_forked, args=(environment, jobs, log))
        process.start()
        started.append((process, log))
    return started


def finish(started):
    """Wait for all processes. -> [(exit code, what it printed)]"""
    for process, _ in started:
        process.join(timeout=240)
    for process, _ in started:
        process.kill()  # does nothing to one that has ended
    return [(process.exitcode, log.read_text()) for process, log in started]


def weights(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == "Qwen3ForCausalLM" == model.config.architectures[0]
    return model.state_dict()


def succeed(started):
    for code, text in finish(started):
        assert code == 0, text[-3000:]


@pytest.fixture(scope="module")
def arguments(world, tmp_path_factory):
    """A run on 8 prompts a step, with responses of different lengths; with a tied and with an untied student."""
    untied = make_checkpoint(tmp_path_factory.mktemp("untied") / "student", eos="<|endoftext|>", seed=1, tied=False)
    base = world | dict(batch_size=8, micro_batch_size=2, max_new_tokens=20, eval_max_new_tokens=8)
    return {"tied": base, "untied": base | {"student": untied}}


def test_any_number_of_processes_and_two_nodes_do_the_same(arguments, tmp_path, monkeypatch):
    """fp32. After one SGD step the logs agree to 1e-5 and so do the changes of the weights, that is, the gradients."""
    one_step = dict(steps=1, lr=1.0, eval_every=0, lengths="20", held_out=3)

    def jobs(name, kinds, **more):
        dirs = {kind: str(tmp_path / name / "-".join(kind) / "run") for kind in kinds}
        return [(s, arguments_of(s, arguments[k] | one_step, out_dir=dirs[s, k]) | more) for s, k in kinds]

    every = [(script, "tied") for script in SCRIPTS] + [("opd", "untied"), ("sft_offpolicy", "untied")]
    two = start(2, jobs("2", every, sgd=True), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", distributed_worker.sgd)
        patch.setattr(importlib.import_module("grpo"), "grade", even_length)
        for script, job in jobs("1", every):
            run(script, **job)
    succeed(two)
    succeed(start(4, jobs("4", [("opd", "tied"), ("opd", "untied")], sgd=True), tmp_path))
    succeed(start(2, jobs("nodes", [("opd", "tied")], sgd=True), tmp_path, nodes=2))

    compared = 0
    for path in sorted((tmp_path / "1").glob("*-*")):
        script, kind = path.name.split("-")
        alone = read_log(path / "run")
        assert alone[1]["response_len"] % 1, "responses of different lengths"
        assert alone[1]["grad_norm"] > 0
        before, after = weights(arguments[kind]["student"]), weights(path / "run/model")
        for other in [tmp_path / name / path.name / "run" for name in ("2", "4", "nodes")]:
            if not other.exists():
                continue
            for row, expected in zip(read_log(other), alone, strict=True):
                assert row == pytest.approx(expected, rel=1e-5, abs=1e-7), other  # a loss of GRPO may be 1e-9
            for name, weight in weights(other / "model").items():
                step, expected = weight - before[name], after[name] - before[name]
                rounding = 2e-7 * weight.norm()  # of the weight itself, in fp32
                assert (step - expected).norm() <= 1e-5 * expected.norm() + rounding, (other, name)
            compared += 1
    assert compared == len(every) + 2 + 1


def test_a_failing_process_ends_the_job_and_its_state_resumes_under_one_and_four(arguments, tmp_path):
    """Process 1 of 2 fails in step 4: its error is in one place, and the job can be continued by any number."""
    job = arguments["tied"] | dict(steps=5, save_every=2, eval_every=0)
    cut, four = tmp_path / "cut-1", tmp_path / "cut-4"
    jobs = json.dumps([("opd", job | {"out_dir": str(cut)})])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, jobs]
    environment = os.environ | {"SICK_AT": "4"}
    sick = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    run("opd", **job, out_dir=tmp_path / "whole")
    _, errors = sick.communicate(timeout=240)
    assert sick.returncode != 0 and errors.count("RuntimeError: process 1 is ill") == 1
    assert [row["step"] for row in read_log(cut)] == [0, 1, 2, 3] and (cut / "state-2").exists()
    shutil.copytree(cut, four)
    many = start(4, [("opd", job | {"out_dir": str(four)})], tmp_path)
    run("opd", **job, out_dir=cut)
    succeed(many)
    for path in (cut, four):
        for row, expected in zip(read_log(path), read_log(tmp_path / "whole"), strict=True):
            assert row == pytest.approx(expected, rel=1e-3), path  # AdamW has blown the rounding up


def test_a_process_takes_the_gpu_of_its_own_before_it_meets_the_others_and_no_attention_by_cudnn(monkeypatch):
    """Else all of a node's would put what NCCL needs on the first one. RANK says who it is among all nodes' processes."""
    done, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    monkeypatch.setattr(processes.dist, "init_process_group", lambda kind, **options: done.append((kind, options)))
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    processes.start_processes()
    assert done == [device, ("nccl", {"device_id": device})]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bad_input_is_reported_by_one_process(arguments, tmp_path):
    job = arguments["tied"] | {"out_dir": str(tmp_path / "run"), "data": "no-such-file.jsonl"}
    ended = finish(start(2, [("opd", job)], tmp_path))
    assert all(code == 1 for code, _ in ended)
    assert sum(text.count("cannot load 'no-such-file.jsonl'") for _, text in ended) == 1
    assert not (tmp_path / "run").exists()
