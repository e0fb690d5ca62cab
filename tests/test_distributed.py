"""One, two and four processes, and two nodes, do the same: rollouts, loss, gradient, evaluation; states move between."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, make_checkpoint, read_log

SCRIPTS = ["sft_offpolicy", "dagger_onpolicy", "offline_rl_distill", "opd"]
WORKER = str(ROOT / "tests/distributed_worker.py")


def start(processes, jobs, *options):
    command = [sys.executable, WORKER, json.dumps(jobs)]
    if processes > 1:
        options = options or ("--standalone",)
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*started):
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def arguments(world, tmp_path_factory):
    """A run of several steps on 8 prompts a step, with responses of different lengths; and an untied student."""
    untied = make_checkpoint(tmp_path_factory.mktemp("untied") / "student", eos="<|endoftext|>", seed=1, tied=False)
    base = world | dict(batch_size=8, micro_batch_size=2, max_new_tokens=30, eval_max_new_tokens=20)
    return {"tied": base, "untied": base | {"student": untied}}


def test_any_number_of_processes_and_two_nodes_do_the_same(arguments, tmp_path):
    """fp32. After one SGD step the logs agree to 1e-5 and so do the weights, which is to say the gradients."""

    def jobs(name):
        one_step = dict(steps=1, sgd=True, lr=0.1, eval_every=0)
        kinds = [(s, "tied") for s in SCRIPTS] + [("opd", "untied"), ("sft_offpolicy", "untied")]
        return [(s, arguments[k] | one_step | {"out_dir": str(tmp_path / name / f"{s}-{k}")}) for s, k in kinds]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    finish(start(1, jobs("1")))
    finish(start(2, jobs("2")))
    finish(start(4, jobs("4")))
    node = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    finish(*(start(1 + 1, jobs("nodes")[-2:-1], *node, str(rank)) for rank in (0, 1)))

    for path in sorted((tmp_path / "1").glob("*-*")):
        alone, model = read_log(path), transformers.AutoModelForCausalLM.from_pretrained(path / "model").state_dict()
        before = transformers.AutoModelForCausalLM.from_pretrained(
            arguments[path.name.split("-")[1]]["student"]
        ).state_dict()
        others = [tmp_path / name / path.name for name in ("2", "4", "nodes")]
        for other in [other for other in others if other.exists()]:
            together = read_log(other)
            for row, expected in zip(together, alone, strict=True):
                assert row == pytest.approx(expected, rel=1e-5), other
            assert alone[1]["response_len"] % 1, "responses of different lengths"
            loaded = transformers.AutoModelForCausalLM.from_pretrained(other / "model")
            assert type(loaded).__name__ == "Qwen3ForCausalLM" == loaded.config.architectures[0]
            for name, weight in loaded.state_dict().items():
                step, expected = weight - before[name], model[name] - before[name]
                assert (step - expected).norm() <= 1e-5 * expected.norm() + 1e-9, (other, name)
    assert (tmp_path / "nodes/opd-untied/model").exists()


def test_a_state_written_by_two_processes_resumes_under_one_and_four(arguments, tmp_path):
    """Rank 1 dies in the middle of step 4; its error ends the job and is what one reads; the others continue it."""
    job = dict(steps=5, save_every=2, eval_every=0)
    whole = tmp_path / "whole"
    finish(start(1, [("opd", arguments["tied"] | job | {"out_dir": str(whole)})]))
    killer = (
        "import common, torch.distributed as d; f = common.sample\n"
        "def sample(model, prompts, keys, *a, **k):\n"
        "    if keys[0][1:2] == (4,) and d.get_rank() == 1 and k.get('stream') is None: raise RuntimeError('rank 1 is ill')\n"
        "    return f(model, prompts, keys, *a, **k)\n"
        "common.sample = sample\n"
    )
    (tmp_path / "sick.py").write_text(killer + (ROOT / "tests/distributed_worker.py").read_text())
    text = (tmp_path / "sick.py").read_text().replace("Path(__file__).resolve().parent.parent", f"Path({str(ROOT)!r})")
    (tmp_path / "sick.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + text)
    cut = tmp_path / "cut-1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    jobs = [("opd", arguments["tied"] | job | {"out_dir": str(cut)})]
    sick = subprocess.run([*command, str(tmp_path / "sick.py"), json.dumps(jobs)], capture_output=True, text=True)
    assert sick.returncode != 0 and sick.stderr.count("RuntimeError: rank 1 is ill") == 1
    assert [row["step"] for row in read_log(cut)] == [0, 1, 2, 3] and (cut / "state-2").exists()
    four = tmp_path / "cut-4"
    subprocess.run(["cp", "-r", str(cut), str(four)], check=True)
    for processes, path in ((1, cut), (4, four)):
        finish(start(processes, [("opd", arguments["tied"] | job | {"out_dir": str(path)})]))
        assert len(read_log(path)) == 6
        for row, expected in zip(read_log(path), read_log(whole), strict=True):
            assert row == pytest.approx(expected, rel=1e-3)  # five steps of AdamW apart
    models = [transformers.AutoModelForCausalLM.from_pretrained(p / "model").state_dict() for p in (whole, cut, four)]
    for name, weight in models[0].items():
        assert all(torch.allclose(weight, other[name], atol=2e-3) for other in models[1:])


def test_bad_input_is_reported_by_one_process(arguments, tmp_path):
    job = arguments["tied"] | {"out_dir": str(tmp_path / "run"), "data": "no-such-file.jsonl"}
    process = start(2, [("opd", job)])
    _, errors = process.communicate()
    assert process.returncode != 0 and errors.count("no data file 'no-such-file.jsonl'") == 1
    assert not (tmp_path / "run/args.json").exists()
