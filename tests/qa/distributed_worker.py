"""Run scripts, one after the other, in one process of several; started by test_distributed.py, or by torchrun as

python distributed_worker.py JSON, a list of [script, arguments]. With "sgd" among the arguments the optimizer is
plain SGD: AdamW turns a difference of 5e-9 in a gradient into one of 3e-5 in a weight, SGD keeps it what it is.
With SICK_AT=n in the environment, process 1 fails when it begins to sample for step n. Nothing may run a sharded model's
LM head: sampler and loss multiply by its matrix themselves, at the positions that they need.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # tests/ and what it tests

import torch

import opd  # noqa: F401  all that the scripts import, once, before the process is forked
from conftest import even_length, run
from plumbing.processes import rank_and_world
from plumbing.runs import Run

ADAMW = torch.optim.AdamW


def sgd(params, lr, **others):
    return torch.optim.SGD(params, lr=lr)


def load_without_head(*args, load=Run.load, **kwargs):
    model = load(*args, **kwargs)
    model.get_output_embeddings().forward = None
    return model


def work(jobs):
    torch.set_num_threads(1)
    Run.load = load_without_head
    for script, arguments in jobs:
        module = importlib.import_module(script)
        torch.optim.AdamW = sgd if arguments.pop("sgd", 0) else ADAMW
        if script == "grpo":
            module.grade = even_length
        if "SICK_AT" in os.environ:
            healthy = module.sample

            def sample(model, prompts, keys, *args, healthy=healthy, **kwargs):
                if keys[0][1] == int(os.environ["SICK_AT"]) and rank_and_world()[0] == 1:
                    raise RuntimeError("process 1 is ill")
                return healthy(model, prompts, keys, *args, **kwargs)

            module.sample = sample
        run(script, **arguments)


def work_forked(environment, jobs, log):
    """The same in a process that has been forked, where all is imported already; its output goes to the file log."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    work(jobs)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
