"""A run loses nothing: killed anywhere, again and again, or out of disk space, it continues as if nothing had been."""

import importlib
import inspect
import itertools
import resource
import shutil
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conftest import SCRIPTS, arguments_of, even_length, read_log, run

from common import TeacherRollouts
from plumbing import fast, runs
from plumbing.runs import Run

LONGER = dict(steps=6, save_every=2, eval_every=3, eval_k=1, updates_per_step=2)
CLOSING = dict(lengths="2,4,6", h_min=4.585, on_closed="continue")  # the curriculum's gate opens once, and closes


class Killed(BaseException):
    """What kill -9 leaves behind: no handler of the program's own runs."""


def die_at(patch, module, name, nth, before):
    """Let the nth call of module.name be the last thing the process does: `before` it, or after its work is done."""
    original, calls = getattr(module, name), itertools.count(1)

    def fatal(*args, **kwargs):
        last = next(calls) == nth
        result = None if last and before else original(*args, **kwargs)
        if last:
            raise Killed
        return result

    patch.setattr(module, name, fatal)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(script, world, tmp_path, monkeypatch):
    """Eleven kills on the way to one result: while sampling, scoring, updating, evaluating, logging, saving."""
    module, arguments = importlib.import_module(script), arguments_of(script, world, **LONGER, **CLOSING)
    if script == "grpo":
        monkeypatch.setattr(module, "grade", even_length)
    run(script, **arguments, out_dir=tmp_path / "whole/run")
    cut = tmp_path / "cut/run"
    own = "sample(student" in inspect.getsource(module)  # prefixes of its own
    source = (module, "sample") if own else (TeacherRollouts, "__call__")
    transition = [(Run, "save_state", 1, True), (Run, "save_state", 2, True)]  # before and after "stable" is written
    places = [
        (Run, "_evaluate", 1, True),  # before the first update
        *(transition if script == "curriculum" else []),
        (*source, 2, False),
        (fast, "response_hidden", 5, False),  # while scoring
        (torch.nn.utils, "clip_grad_norm_", 3, False),  # before the update of step 3, with step 2 saved
        (Run, "_log", 1, False),
        (Run, "_evaluate", 1, False),
        (runs.dcp, "save", 1, True),  # while saving: nothing written
        (runs.dcp, "save", 1, False),  # ... weights, but not how far the run is
        (shutil, "rmtree", 1, False),  # ... all of it, under its provisional name
        (shutil, "rmtree", 2, True),  # ... the new state, and the old one still there
        (runs, "draw_curves", 1, False),  # all steps done, no model yet
        (transformers.PreTrainedModel, "save_pretrained", 1, False),  # weights, but no tokenizer
    ]
    kills = 0
    for module_or_library, name, nth, before in places:
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, module_or_library, name, nth, before)
            try:
                run(script, **arguments, out_dir=cut)
            except Killed:
                kills += 1
        if name == "_log":
            with open(cut / "log.jsonl", "a") as file:
                file.write('{"step": 3, "los')
    assert kills >= 11 and not (cut / "model").exists()
    run(script, **arguments, out_dir=cut)
    rows = read_log(cut)
    assert rows == read_log(tmp_path / "whole/run")
    gates = [row["gate_open"] for row in rows if "gate_open" in row]
    assert gates == ([True, False] if script == "curriculum" else [])
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / d / "run/model") for d in ("cut", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models)))


@pytest.mark.parametrize("limit", [0, 2000, 60_000])
def test_a_full_disk_costs_nothing(limit, world, tmp_path, capsys):
    """No file can grow past `limit` bytes: the operating system fails the write. Nothing is written in place: the last
    good state is intact, and with room again the run goes on from it. (capsys: else pytest's own captures are files.)"""
    arguments = arguments_of("opd", world, **LONGER)
    run("opd", **arguments, out_dir=tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # a run that has saved step 2
        die_at(patch, Run, "_evaluate", 2, True)
        run("opd", **arguments, out_dir=cut)
    state = lambda: {path.name: path.read_bytes() for path in (cut / "state-2").iterdir()}  # noqa: E731
    before = state()
    handler, old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises((OSError, dcp.api.CheckpointException)):
            run("opd", **arguments, out_dir=cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert state() == before
    run("opd", **arguments, out_dir=cut)
    assert read_log(cut) == read_log(tmp_path / "whole")
