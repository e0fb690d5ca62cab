"""A run loses nothing: killed anywhere, again and again, or out of disk space, it goes on as if nothing had been."""

import importlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, SCRIPTS, arguments_of, argv, even_length, read_log, run
from test_scripts import load

import curriculum
import grpo
import plumbing.run
from plumbing.run import Run, checkpoints

LONGER = dict(steps=6, save_every=2, eval_every=2, eval_k=1, estimator="sampled")


class Killed(BaseException):
    """What kill -9 leaves behind: no handler of the program's own runs."""


def kill_at(module, name, nth, before, **arguments):
    """Run a script whose last deed is the nth call of module.name: `before` it, or after its work is done."""
    original, calls = getattr(module, name), itertools.count(1)

    def fatal(*args, **kwargs):
        last = next(calls) == nth
        result = None if last and before else original(*args, **kwargs)
        if last:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, fatal)
        run(**arguments)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(cut, whole):
    """Same logs, same weights, same files, nothing half-written."""
    assert read_log(cut) == read_log(whole) and sorted(os.listdir(cut)) == sorted(os.listdir(whole))
    assert all(map(torch.equal, load(cut / "model").parameters(), load(whole / "model").parameters()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(script, world, tmp_path, monkeypatch, curves):
    """The curriculum's gate opens at step 2 and closes at step 4. Losses and rollouts draw random numbers."""
    gate = lambda *a, max_new_tokens, **k: [dict(nats=2 / max_new_tokens, length=1)]
    monkeypatch.setattr(curriculum, "respond", gate)
    monkeypatch.setattr(grpo, "grade", even_length)
    module, cut = importlib.import_module(script), tmp_path / "cut"
    arguments = dict(script=script) | arguments_of(script, world, **LONGER, on_closed="continue", h_min=0.9)
    run(**arguments, out_dir=tmp_path / "whole")
    prefixes, tensors = "sample" if hasattr(module, "sample") else "teacher_rollouts", plumbing.run.torch
    for owner, name, nth, before, left in (
        (module, "evaluate", 1, True, []),  # before the first update
        (module, prefixes, 2, False, []),
        (tensors, "save", 1, False, []),  # all is written, under its provisional name: also the curriculum's open gate
        (module, "evaluate", 2, True, [2]),  # a checkpoint comes before the evaluation of its step
        (torch.nn.utils, "clip_grad_norm_", 1, True, [2]),  # before the update of step 3
        (Run, "log", 2, False, [2]),  # row 3, here cut short
        (tensors, "save", 1, True, [2]),  # weights, but not how far the run is: also the curriculum's closed gate
        (shutil, "rmtree", 4, True, [2, 4]),  # the new checkpoint, and the old one still there
        (module, "evaluate", 1, True, [2, 4]),  # between checkpoint and evaluation
        (module, "evaluate", 1, False, [2, 4]),  # between evaluation and row
        (Run, "log", 1, False, [2, 4]),  # the checkpoint's own row, cut short
        (transformers.PreTrainedModel, "save_pretrained", 2, False, [6]),  # weights of model/, but no tokenizer
        (plumbing.run, "draw_curves", 1, True, [6]),  # no curves
    ):
        kill_at(owner, name, nth, before, **arguments, out_dir=cut)
        assert sorted(checkpoints(cut)) == left
        if name == "log":
            row = (cut / "log.jsonl").read_text(encoding="utf-8")
            (cut / "log.jsonl").write_text(row[:-9], encoding="utf-8")
    run(**arguments, out_dir=cut)
    same(cut, tmp_path / "whole")


@pytest.mark.parametrize("limit", [0, 2500, 60_000])
def test_a_full_disk_costs_nothing(limit, world, tmp_path, capsys):
    """No file can grow past `limit` bytes: the operating system fails the write. Nothing is written in place: the last
    checkpoint is intact, and with room again the run goes on from it. (capsys: else pytest's captures are files.)"""
    arguments, cut = dict(script="opd") | arguments_of("opd", world, **LONGER), tmp_path / "cut"
    run(**arguments, out_dir=tmp_path / "whole")
    kill_at(importlib.import_module("opd"), "evaluate", 2, True, **arguments, out_dir=cut)
    before = contents(cut / "checkpoint-2")
    handler, old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises((SystemExit, OSError), match="cannot write|File too large"):
            run(**arguments, out_dir=cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(cut / "checkpoint-2") == before
    run(**arguments, out_dir=cut)
    same(cut, tmp_path / "whole")


def test_signals_from_outside(world, tmp_path):
    """A real process. Asked to stop it says so, finishes the step, saves, and says how to go on."""
    arguments, cut = world | dict(steps=60, save_every=5, eval_every=0), tmp_path / "cut"
    command = [sys.executable, str(ROOT / "opd.py"), *argv(arguments), "--out_dir", str(cut)]
    for sent, rows in ((signal.SIGKILL, 7), (signal.SIGINT, 13), (signal.SIGTERM, 19)):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
        process = subprocess.Popen(command, **pipes, cwd=tmp_path)
        while process.poll() is None and len(plumbing.run.read_lines(cut / "log.jsonl")) < rows:
            time.sleep(0.01)
        process.send_signal(sent)
        said = process.communicate()[0]
        now, then = said.find("stopping: the step under way"), said.find("the same command goes on from there")
        assert sent == signal.SIGKILL or process.returncode == 1 and 0 < now < then and "Traceback" not in said, said
    run("opd", **arguments, out_dir=cut)
    run("opd", **arguments, out_dir=tmp_path / "whole")
    same(cut, tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_refused_and_goes_on_with_more_steps(script, world, tmp_path, monkeypatch):
    """... as one that was that long from the start, also where it is killed as it goes on; but not the curriculum's."""
    monkeypatch.setattr(grpo, "grade", even_length)
    arguments = arguments_of(script, world, **LONGER | dict(steps=4), warmup_steps=5) | {"out_dir": tmp_path / "run"}
    run(script, **arguments)
    before, bad = contents(tmp_path / "run"), [({}, "is finished"), (dict(steps=3), "--steps was 4, now 3")]
    bad += [(dict(lr=0.1, seed=1), "--lr was 0.001, now 0.1; --seed was 0, now 1")]
    for change, pattern in bad + [(dict(steps=6), "--steps was 4, now 6")] * (script == "curriculum"):
        with pytest.raises(SystemExit, match=pattern) as refused:
            run(script, **arguments | change)
        assert "\n" not in refused.value.code and contents(tmp_path / "run") == before
    if script != "curriculum":
        longer = arguments | dict(steps=6)
        kill_at(Run, "steps", 1, True, script=script, **longer)
        run(script, **longer | dict(save_every=7))
        run(script, **longer | dict(out_dir=tmp_path / "whole"))
        same(tmp_path / "run", tmp_path / "whole")


def test_a_signal_before_the_first_step_is_one_line():
    from plumbing.run import start

    before = signal.getsignal(signal.SIGINT)
    start()
    with pytest.raises(SystemExit, match="^error: stopped; the same command goes on"):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
