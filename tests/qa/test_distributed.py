"""Two processes, as torchrun starts them, go through all scripts once; here is looked at what they have left behind."""

import json
import multiprocessing
import os
import re

import distributed_worker
import pytest
import torch
from conftest import ROOT, SCRIPTS, arguments_of, make_checkpoint, read_log, run, write_jsonl
from test_scripts import load
from torch.distributed.elastic.utils.distributed import get_free_port

# Importing torch and transformers is most of what a short-lived process does: import them once, then fork.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["distributed_worker"])
# Where the server, which is not pytest's child, finds it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / folder) for folder in ("tests/qa", "tests", ".")])

LADDER = dict(script="curriculum", prefixes="teacher", kl="mixed", lengths="20", held_out=3)
SFT, OFFLINE = dict(script="sft_offpolicy"), dict(script="offline_rl_distill")
ON_TEACHER_PREFIXES = dict(sft=SFT, offline=OFFLINE, ladder=LADDER, untied=SFT, mute=SFT)


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """What two processes do, one after the other. -> where, what one process is to do, and what both have said"""
    out = tmp_path_factory.mktemp("two")
    untied = make_checkpoint(out / "student", eos="<|endoftext|>", seed=1, tied=False)
    base = world | dict(batch_size=8, micro_batch_size=2, max_new_tokens=20, steps=1, lr=1.0, eval_data="none")
    same = []
    for name, job in ON_TEACHER_PREFIXES.items():
        more = {"student": untied} if name == "untied" else {}
        arguments = arguments_of(job["script"], base | job | more) | {"out_dir": str(out / "2" / name)}
        same.append(dict(script=job["script"], arguments=arguments, sgd=True, mute=name == "mute"))
    few = dict(steps=2, eval_every=1, h_min=0, lengths="4,6", group_size=4)
    runs = []
    for script in SCRIPTS:
        for name, stop_at in (("whole", 0), ("cut", 1), ("cut", 0)):
            arguments = arguments_of(script, world, **few, out_dir=str(out / f"{script}-{name}"))
            runs.append(dict(script=script, arguments=arguments, stop_at=stop_at))
    rows = [json.loads(line) for line in open(world["data"], encoding="utf-8")]
    one = write_jsonl(out / "one.jsonl", rows[:1])
    alike = world | dict(data=one, eval_data=one, batch_size=2, max_new_tokens=20, steps=4, out_dir=str(out / "alike"))
    bad = world | dict(data="no-such-file.jsonl", out_dir=str(out / "bad"))
    greedy = dict(model=world["teacher"], eval_data=world["data"], eval_temperature=0, eval_max_new_tokens=9)
    greedy |= dict(out_file=str(out / "greedy-2.jsonl"))
    jobs = [*same, *runs, dict(script="opd", arguments=alike), dict(script="opd", arguments=bad)]
    jobs.append(dict(script="evaluate", arguments=greedy))

    of_both, started = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=get_free_port()), []
    for rank in (0, 1):
        environment = of_both | dict(RANK=rank, LOCAL_RANK=rank)
        process = FORK.Process(target=distributed_worker.work_forked, args=(environment, jobs, out / f"{rank}.log"))
        process.start()
        started.append(process)
    for process in started:
        process.join(timeout=240)
        process.kill()  # does nothing to one that has ended
    said = [(out / f"{rank}.log").read_text(encoding="utf-8") for rank in (0, 1)]
    assert [process.exitcode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return out, dict(zip(ON_TEACHER_PREFIXES, same)), greedy, said


@pytest.mark.parametrize("name", ON_TEACHER_PREFIXES)
def test_on_teacher_prefixes_two_processes_have_the_loss_and_gradient_of_one(name, two, tmp_path):
    """fp32, one step of SGD: the logs agree to 1e-5, and so do the changes of the weights, that is, the gradients. Also
    where one process has no response tokens: it goes through the models all the same."""
    out, same, *_ = two
    job = same[name] | dict(arguments=same[name]["arguments"] | {"out_dir": str(tmp_path / "run")})
    distributed_worker.work(**job)
    (_, expected), (_, row) = read_log(tmp_path / "run"), read_log(out / "2" / name)
    expected.pop("gate_entropy", None)  # which is sampled, by each process for itself
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5) and expected["grad_norm"] > 0
    before = dict(load(job["arguments"]["student"]).named_parameters())
    alone, together = (dict(load(path / "model").named_parameters()) for path in (tmp_path / "run", out / "2" / name))
    for key, weight in alone.items():
        step, rounding = weight - before[key], 2e-7 * weight.norm()  # of the weight itself, in fp32
        assert (together[key] - weight).norm() <= 1e-5 * step.norm() + rounding, key


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_one_process_was_told_to_stop_goes_on_as_if_it_had_not_been(script, two):
    out, _, _, said = two
    whole, cut = out / f"{script}-whole", out / f"{script}-cut"
    rows = read_log(cut)
    assert rows == read_log(whole) and [row["step"] for row in rows] == [0, 1, 2]
    assert all("avg_at_k" in row for row in rows)
    assert all(map(torch.equal, load(cut / "model").parameters(), load(whole / "model").parameters()))
    assert [text.count(f"exit of {script}: stopped after step 1") for text in said] == [1, 0]


def test_what_the_first_process_says_the_second_does_not(two):
    out, _, _, said = two
    assert [text.count("cannot load 'no-such-file.jsonl'") for text in said] == [1, 0]
    assert not (out / "bad").exists() and "exit of opd: 1\n" in said[1]
    assert not re.search("warning|step|problems", said[1].split("exit of opd: 1")[0])


def test_processes_draw_for_themselves_and_evaluate_together(two, tmp_path, world):
    """Asked the same, they say different things; greedily, together, what one process says."""
    out, _, greedy, _ = two
    assert any(row["response_len"] % 1 for row in read_log(out / "alike")[1:]), "responses of different lengths"
    first, second = (
        json.loads(line)["response_ids"] for line in open(out / "alike/responses-0.jsonl", encoding="utf-8")
    )
    assert first != second
    run("evaluate", **greedy | {"out_file": tmp_path / "1.jsonl"})
    texts = [path.read_text(encoding="utf-8") for path in (out / "greedy-2.jsonl", tmp_path / "1.jsonl")]
    rows = [[json.loads(line)["response_ids"] for line in text.splitlines()] for text in texts]
    assert rows[0] == rows[1]


def test_one_process_goes_on_where_two_have_been(two, world, capsys):
    out, *_ = two
    few = dict(steps=3, eval_every=1, out_dir=str(out / "opd-whole"))
    run("opd", **world | few)
    assert capsys.readouterr().out.count("processes changed since") == 1
    assert [row["step"] for row in read_log(out / "opd-whole")] == [0, 1, 2, 3]
