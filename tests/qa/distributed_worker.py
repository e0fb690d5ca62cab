"""One process of several, which runs scripts one after the other; test_distributed.py forks two of them."""

import importlib
import os
import signal

import pytest
import torch
from conftest import even_length, run
from test_scripts import SGD

import grpo
from plumbing.processes import rank_and_world
from plumbing.run import Run


def work(script, arguments, sgd=False, mute=False, stop_at=0):
    """Run a script, and print its exit. sgd: with plain SGD. mute: every other row of a batch has no response tokens,
    of two processes all those of the second one. stop_at: after this step the second process is told to stop."""
    module, record = importlib.import_module(script), Run.record
    original = getattr(module, "teacher_rollouts", None)

    def muted(*args):
        (rank, world), rollouts = rank_and_world(), original(*args)
        rollouts.mask[[(rank + world * i) % 2 == 1 for i in range(len(rollouts.mask))]] = False
        return rollouts

    def stopped(self, *args, **kwargs):
        record(self, *args, **kwargs)
        if self.step == stop_at and rank_and_world()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", stopped)
        patch.setattr(grpo, "grade", even_length)
        if sgd:
            patch.setattr(torch.optim, "AdamW", SGD)
        if mute:
            patch.setattr(module, "teacher_rollouts", muted)
        try:
            run(script, **arguments)
        except SystemExit as exit:
            print(f"exit of {script}: {exit.code}")


def work_forked(environment, jobs, log):
    """The same in a process that has been forked, where all is imported already; its output goes to the file log."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for job in jobs:
        work(**job)
