"""Bad input: one line that says what is wrong, exit status 1, nothing lost, no model loaded for what is known before.

Each row of the tables is one way to get it wrong: what is changed about a run that works, and what the line must say.
Values that are functions prepare a file or a checkpoint, (folder to write in, the working arguments) -> its path.
"""

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets  # noqa: F401  its log goes to the stderr that it finds first: not that of one test
import pytest
import transformers
from conftest import ROOT, SCRIPTS, arguments_of, argv, make_tokenizer, read_log, run

import common
import opd
from plumbing.arguments import check_args, parse
from plumbing.run import Run

ROW, SYSTEM = {"question": "What is 1+1?", "answer": "2", "response": "2"}, {"role": "system", "content": "Be brief."}
TOOL, USER = {"role": "tool", "content": "7"}, {"role": "user", "content": "1+1?"}


def put(path, content):
    """Write a file: bytes, a text, or rows. -> its path"""
    content = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


data = lambda name, content, argument="data": {argument: lambda folder, world: put(folder / name, content)}
second_row = lambda row, argument="data": data("rows.jsonl", [ROW, row], argument)
only = lambda row, argument="data": data("rows.jsonl", [row, row], argument)


def changed(role, *edits):
    """A copy of the working student or teacher with some of its files changed."""

    def prepare(folder, world):
        path = shutil.copytree(world[role], folder / role)
        for edit in edits:
            edit(path)
        return str(path)

    return {role: prepare}


student, teacher = partial(changed, "student"), partial(changed, "teacher")
write = lambda name, text: lambda path: put(path / name, text)
edit = lambda name, old, new: lambda path: put(path / name, re.sub(old, new, (path / name).read_bytes()))
remove = lambda *names: lambda path: [(path / name).unlink() for name in names]
halve = lambda path: os.truncate(path, path.stat().st_size // 2)
tokenizer = lambda **options: lambda path: make_tokenizer("<|im_end|>", **options).save_pretrained(path)
another_script = dict(
    out_dir=lambda at, _: str(Path(put(Path(at, "args.json"), '{"script": "dagger_onpolicy.py"}')).parent)
)
in_out_dir = lambda name, content: dict(out_dir=lambda folder, world: str(Path(put(folder / name, content)).parent))
set_to = lambda name, key, value: edit(name, rb'"%b": (\[[^]]*\]|[^,}]*)' % key, b'"%b": %b' % (key, value))
NO_END = [set_to("config.json", b"eos_token_id", b"null"), set_to("tokenizer_config.json", b"eos_token", b"null")]
NO_END += [remove("generation_config.json")]
NO_NORM = edit("model.safetensors", b"model.norm.weight", b"model.norm.height")
EXCHANGED = edit(
    "tokenizer.json", b"<.im_(start|end).>", lambda m: b"<|im_end|>" if b"start" in m[0] else b"<|im_start|>"
)
NO_TURNS = edit("tokenizer.json", rb'(?s)("content": "<.endoftext.>".*?\}),.*?\n  \]', rb"\1\n  ]")
QUANTISED = edit("config.json", rb"^\{", b'{"quantization_config": {"quant_method": "fp8"},')
ONE_LAYER = [set_to("config.json", b"num_hidden_layers", b"1")]
ONE_LAYER += [set_to("config.json", b"layer_types", b'["full_attention"]')]
END_BEYOND = set_to("generation_config.json", b"eos_token_id", b"400")
NAN = set_to("config.json", b"rms_norm_eps", b"NaN")
TOY = dict(student=str(ROOT / "toy/student"), teacher=str(ROOT / "toy/teacher"), eval_max_new_tokens=6)
BEFORE_MODELS = {
    # the command line
    "unknown flag": (dict(stepz=3), "unrecognized arguments: --stepz", "--help"),
    "abbreviated flag": (dict(step=3), "unrecognized arguments: --step", "--help"),
    "word for a number": (dict(steps="ten"), "--steps", "invalid int value: 'ten'"),
    "flag that is neither yes nor no": (dict(thinking="perhaps"), "--thinking", "perhaps"),
    "unknown estimator": (dict(estimator="k3"), "--estimator: invalid choice: 'k3'", "exact", "sampled"),
    "number out of bounds": (dict(steps=0), "--steps is 0, and must be at least 1"),
    "empty name in a list": (dict(eval_data=","), "cannot load ''"),
    # the output directory
    "no directory": (dict(out_dir=""), "--out_dir"),
    "output under a file": (dict(out_dir=lambda at, _: put(at / "file", "") + "/run"), "cannot write to --out_dir"),
    "results of nobody knows what": (in_out_dir("log.jsonl", "{}\n"), "no args.json", "another"),
    "damaged args.json": (in_out_dir("args.json", '{"steps": '), "args.json is damaged", "--out_dir"),
    "args.json of something else": (in_out_dir("args.json", "[1]"), "args.json is damaged", "--out_dir"),
    # data
    "no data file": (dict(data="nowhere.jsonl"), "cannot load 'nowhere.jsonl'", "No such file"),
    "empty file": (data("a.jsonl", "\n\n"), "a.jsonl: no rows left", "it is empty"),
    "not JSON": (data("a.jsonl", '\n{"question": "a"}\n{"question": \n'), "a.jsonl'", "JSONDecodeError", "line 3"),
    "JSON without columns": (data("a.jsonl", '{"question": "a"}\n["b"]\n'), "row 2", "needs columns", "is a list"),
    "damaged parquet": (data("a.parquet", b"PAR1 not really"), "cannot load", "a.parquet"),
    "unknown kind of file": (data("a.xlsx", b"PK"), "cannot load", "a.xlsx", ".jsonl"),
    "not on the hub": (dict(data="no-such-organisation/no-such-data"), "'no-such-organisation/no-such-data'", "hub"),
    "wrong columns": (data("a.jsonl", [{"text": "a", "label": 1}]), "the columns messages, prompt", "text, label"),
    "a column that is not there": (dict(columns="question=task"), "--columns question=task", "question=question"),
    "nor is it with nothing to evaluate on": (dict(columns="answer=task", eval_data="none"), "--columns answer=task"),
    "a column of no meaning": (dict(columns="level=answer"), "--columns level=answer", "question/response/answer"),
    "a turn without content": (only({"question": [{"role": "user"}]}, "eval_data"), "2 rows that are neither texts"),
    "a turn of nobody": (only({"question": [{"content": "Hi"}, *[USER] * 2]}), "2 rows that are neither texts"),
    "a turn of a tool": (only({"question": [SYSTEM, TOOL]}), "2 rows without a question of the user"),
    "a conversation as one text": (only({"prompt": str([SYSTEM])}), "2 rows with a conversation written as one"),
    "no conversation that asks": (data("a.jsonl", [{"messages": [SYSTEM]}]), "1 rows without a question"),
    "another script's run": (another_script, "holds a run of dagger_onpolicy.py", "another directory"),
    "nothing to evaluate by": (data("a.jsonl", [{"question": "a"}], "eval_data"), "no rows left", "--eval_data none"),
    "no row with a question": (data("a.jsonl", [{"question": " "}]), "a.jsonl: no rows left", "1 rows without a que"),
    "list for an answer": (only(ROW | {"answer": [1]}, "eval_data"), "2 rows whose answer is no text or number"),
    "list for a response": (only(ROW | {"response": [1]}), "2 rows that are neither texts nor lists of turns"),
    "text for response_ids": (only(ROW | {"response_ids": "1 2"}), "2 rows whose response_ids are no list"),
    "ids of another vocabulary": (second_row(ROW | {"response_ids": [5, 303]}), "no ids below 303", "1+1"),
    "half a character": (second_row({"question": "broken \ud83d emoji"}), "broken"),
    "prompts longer than the context": (data("a.jsonl", [{"question": "why " * 600}]), "context of 512", "to be added"),
    "control tokens in every question": (data("a.jsonl", [{"question": "<|im_end|>"}]), "all rows have control tok"),
    "responses longer than the context": (dict(max_new_tokens=512), "context of 512", "512 are to be added"),
    "evaluation longer than the context": (dict(eval_max_new_tokens=600), "context of 512", "600 are to be added"),
    "a language that the toy does not speak": (TOY, "all rows have text that the tokenizer of", "does not know"),
    # models
    "no such student": (dict(student="no-such-organisation/no-such-model"), "student 'no-such", "is no folder here"),
    "folder of something else": (student(remove("config.json")), "no config.json", "student"),
    "folder without weights": (teacher(remove("model.safetensors")), "no weights", "teacher"),
    "config.json not JSON": (student(write("config.json", "{")), "the student", "config.json"),
    "unknown architecture": (student(set_to("config.json", b"model_type", b'"qwen99"')), "qwen99"),
    "not a causal model": (teacher(write("config.json", '{"model_type": "vit"}')), "vit", "causal language model"),
    "bad generation_config.json": (teacher(write("generation_config.json", "{")), "generation_config.json", "delete"),
    "no tokenizer": (student(remove("tokenizer.json", "tokenizer_config.json")), "no tokenizer", "student"),
    "damaged tokenizer": (teacher(write("tokenizer.json", "{")), "the teacher", "Tokenizer"),
    "no chat template": (teacher(remove("chat_template.jinja")), "no chat template", "chat_template.jinja"),
    "bad chat template": (teacher(write("chat_template.jinja", "{% for m in %}")), "chat template fails"),
    "fewer tokens": (teacher(tokenizer(vocab_size=280)), "tokenize differently (id", "one family"),
    "no token for a turn": (student(NO_TURNS), "the prompts use '<|im_start|>', '<|im_end|>'", "one family"),
    "other tokenization": (student(edit("tokenizer.json", rb'(?s)"merges": \[.*\]', b'"merges": []')), "one family"),
    "few logits": (student(set_to("config.json", b"vocab_size", b"290")), "ids up to 302", "'student': 290"),
    "tokens exchanged": (student(EXCHANGED), "tokenize differently (id 30", "one family"),
    "an adapter beside the model": (student(write("adapter_config.json", "{}")), "adapter (LoRA)", "merge_and_unload"),
    "an adapter alone": (teacher(remove("config.json"), write("adapter_config.json", "{}")), "merge_and_unload"),
    "quantised": (teacher(QUANTISED), "--teacher", "is quantised", "take the full weights"),
    "an end token out of reach": (teacher(END_BEYOND), "end tokens [400]", "beyond the vocabulary of 303"),
    "no end token": (student(*NO_END) | teacher(*NO_END), "end token", "eos_token_id", "config.json"),
}  # fmt: skip
WITH_MODELS = {
    "weights cut short": (teacher(lambda path: halve(path / "model.safetensors")), "is damaged or incomplete", "again"),
    "other shape": (student(set_to("config.json", b"intermediate_size", b"96")), "do not fit", "config", "mlp"),
    "a missing weight": (teacher(NO_NORM), "do not fit", "1 missing"),
    "fewer layers than weights": (teacher(*ONE_LAYER), "config.json in", "no place for", "model.layers.1."),
    "a student of NaN": (student(NAN), "cannot be sampled or scored here", "not finite"),
    "a teacher of NaN": (teacher(NAN), "cannot be sampled or scored here", "not finite"),
}  # fmt: skip
CASES = [("opd", *case) for case in (BEFORE_MODELS | WITH_MODELS).items()]  # the siblings share the code
NO_RESPONSE = data("a.jsonl", [{"question": "a", "response": ""}])
CASES += [
    *(("curriculum", f"{x!r}", (dict(lengths=x), f"--lengths is {x!r}")) for x in ("", "4,x", "6,4", "128,256")),
    ("curriculum", "many lengths", (dict(lengths="1,2,4,6"), "--steps is 3, but --lengths has 4 stages")),
    ("curriculum", "all held out", (dict(lengths="2,4", held_out=12), "--held_out is 12", "train.jsonl")),
    ("curriculum", "no responses", (NO_RESPONSE | dict(prefixes="teacher"), "1 rows without a response")),
    ("sft_offpolicy", "no responses", (NO_RESPONSE, "1 rows without a response", "python evaluate.py --model")),
    ("grpo", "no answers", (NO_RESPONSE, "a.jsonl: no rows left", "without an answer that can be graded")),
    ("evaluate", "k > n", (dict(eval_k=4, eval_n=3), "--eval_k is 4 but --eval_n is 3")),
]  # fmt: skip


def contents(directory):
    """Every file under it, byte for byte."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def refusal(script, arguments):
    """What a script says when it refuses: SystemExit with a text prints it, and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        run(script, **arguments)
    line = end.value.code
    assert line.startswith("error: ") and line == " ".join(line.split()) and len(line) < 700, "a line"
    return line


@pytest.mark.parametrize("script, name, case", [pytest.param(*case, id=f"{case[0]}: {case[1]}") for case in CASES])
def test_refused_before_the_run_starts(script, name, case, world, tmp_path, monkeypatch, capfd):
    loaded, load = [], transformers.AutoModelForCausalLM.from_pretrained
    spy = lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    changes, *says = case
    changes = {key: value(tmp_path, world) if callable(value) else value for key, value in changes.items()}
    before = contents(tmp_path)
    line = refusal(script, arguments_of(script, world, out_dir=str(tmp_path / "runs" / "new")) | changes)
    assert [fragment for fragment in says if fragment not in line] == [], line
    assert bool(loaded) == (name in WITH_MODELS)
    assert contents(tmp_path) == before and not (tmp_path / "runs").exists(), "nothing lost, nothing left"
    assert "Traceback" not in capfd.readouterr().err


AT_LEAST_0 = "warmup_steps top_k eval_every eval_problems eval_n seed rollout_batch_size eval_temperature h_min lam"
BOUNDS = {"at least 0": AT_LEAST_0, "above 0": "lr temperature top_p max_grad_norm", "at least 2": "group_size"}


@pytest.mark.parametrize("script", [*SCRIPTS, "evaluate", "look"])
def test_every_number_has_its_bound_in_every_script(script, world, monkeypatch):
    """The least value that is allowed passes; what lies beyond is refused by name, as is what is not finite."""
    Args = importlib.import_module(script).Args
    assert "--eval_max_new_tokens is 0" in refusal(script, arguments_of(script, world, eval_max_new_tokens=0))
    for field in dataclasses.fields(Args):
        if (number := type(field.default)) not in (int, float):
            continue
        bound = next((bound for bound, names in BOUNDS.items() if field.name in names.split()), "at least 1")
        least, above = number(bound.split()[-1]), bound == "above 0"
        check_args(Args(**{field.name: 1e-9 if above else least}))
        bad = [(least if above else least - 1, bound)] + [(1.01, "at most 1")] * (field.name in ("top_p", "lam"))
        bad += [(x, "a finite number") for x in (math.nan, math.inf) if number is float]
        for value, says in bad:
            with pytest.raises(SystemExit, match=f"--{field.name} is {value}, and must be {says}"):
                check_args(Args(**{field.name: value}))
    if script in SCRIPTS:
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(SystemExit, match="--batch_size is 4, and must be a multiple of the 3 processes"):
            check_args(Args(batch_size=4))


def test_help_is_the_docstring_and_what_stands_behind_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(opd.Args, ["--help"])
    said = capsys.readouterr().out
    assert opd.__doc__ in said
    for name, comment in re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(opd.Args), re.M):
        assert f"{comment} (default: {getattr(opd.Args, name)})" in " ".join(said.split()), name


@pytest.fixture
def stopped(world, tmp_path, monkeypatch):
    """A run of 4 steps with its own teacher and data, stopped after the second; -> its arguments."""
    arguments = world | dict(
        teacher=str(shutil.copytree(world["teacher"], tmp_path / "teacher")),
        data=str(shutil.copy(world["data"], tmp_path / "train.jsonl")),
        out_dir=str(tmp_path / "run"), steps=4, eval_every=0)  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after step 2"):
        patch.setattr(Run, "stop_asked", property(lambda run: run.step == 2, lambda run, x: None), raising=False)
        run("opd", **arguments)
    return arguments


def test_of_two_runs_that_begin_in_one_directory_the_second_is_refused(world, tmp_path, monkeypatch):
    """... also where both have found it empty, and are loading their models."""
    arguments = world | dict(out_dir=str(tmp_path / "run"), eval_data="none")
    monkeypatch.setattr(opd, "check_models", lambda *models: run("dagger_onpolicy", **arguments))
    assert "another run has begun in --out_dir" in refusal("opd", arguments)
    assert "dagger_onpolicy" in (tmp_path / "run/args.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes, file, damage, says",
    [
        (dict(lr=0.5, seed=7), "", None, ["holds another run: --lr was 0.001, now 0.5", "--seed was 0, now 7"]),
        (dict(steps=3), "", None, ["--steps was 4, now 3"]),
        ({}, "train.jsonl", halve, ["JSONDecodeError"]),
        ({}, "teacher/config.json", Path.unlink, ["no config.json"]),
        ({}, "run/checkpoint-2/training_state.pt", halve, ["checkpoint-2 is damaged", "to start afresh"]),
        ({}, "run/checkpoint-2/model.safetensors", halve, ["checkpoint-2 is damaged", "to start afresh"]),
        ({}, "run", "finish", ["is finished", "another --out_dir", "more --steps"]),
    ],
)  # fmt: skip
def test_a_refused_command_leaves_a_run_as_it_is(changes, file, damage, says, stopped, tmp_path):
    if damage:
        run("opd", **stopped) if damage == "finish" else damage(tmp_path / file)
    before = contents(tmp_path)
    line = refusal("opd", stopped | changes)
    assert [fragment for fragment in says if fragment not in line] == [], line
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "broken, says",
    [
        (lambda q, p: common.reverse_kl(q, p) * math.inf, "loss inf, gradient norm nan"),
        (lambda q, p: common.reverse_kl(q, p) + (0 * q[..., 0]).abs().sqrt(), "gradient norm nan"),
    ],
    ids=["loss", "gradient"],
)
def test_numbers_that_are_not_finite_cost_no_progress(broken, says, stopped, tmp_path, monkeypatch):
    """They end a run in one line; the same command continues from the last checkpoint as if nothing had been."""
    out, before = tmp_path / "run", contents(tmp_path / "run/checkpoint-2")
    with monkeypatch.context() as patch:
        patch.setattr(opd, "reverse_kl", broken)
        line = refusal("opd", stopped | dict(save_every=1))
    assert "step 3: loss" in line and says in line and ("loss inf" in says) == ("loss inf" in line)
    assert contents(out / "checkpoint-2") == before and not list(out.glob("checkpoint-[34]")) + list(out.glob("model"))
    run("opd", **stopped)
    run("opd", **stopped | {"out_dir": tmp_path / "uninterrupted"})
    assert read_log(out) == read_log(tmp_path / "uninterrupted")


def test_status_and_stderr(world, tmp_path):
    """What the process does: status 1, and one line on stderr."""
    arguments = argv({**world, "data": tmp_path / "a.jsonl", "out_dir": tmp_path / "run"})
    process = subprocess.run([sys.executable, "opd.py", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1 and process.stdout == "" and not (tmp_path / "run").exists()
    assert process.stderr.startswith("error: cannot load") and process.stderr.count("\n") == 1
