"""Bad input: one line that says what is wrong, exit status 1, nothing lost, no model loaded for what is known before.

Each row of the table is one way to get it wrong: what is changed about a run that works, and what the line must say.
Values that are functions prepare a file or a checkpoint, (folder to write in, the working arguments) -> its path.
"""

import importlib
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
from conftest import ROOT, argv, make_tokenizer, read_log, write_jsonl
from safetensors.torch import load_file, save_file

import opd
from plumbing import models, runs

ROW = {"question": "What is 1+1?", "answer": "2"}


def data(name, content, argument="data"):
    """A data file: bytes, text, or a list of rows."""

    def prepare(folder, world):
        if isinstance(content, list):
            return write_jsonl(folder / name, content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / name)

    return {argument: prepare}


def second_row(row, argument="data"):
    return data("rows.jsonl", [ROW, row], argument)


def checkpoint(role, *edits):
    """A copy of the working student or teacher with some of its files changed."""

    def prepare(folder, world):
        path = shutil.copytree(world[role], folder / role)
        for edit in edits:
            edit(path)
        return str(path)

    return {role: prepare}


student, teacher = partial(checkpoint, "student"), partial(checkpoint, "teacher")


def remove(*names):
    return lambda path: [(path / name).unlink() for name in names]


def write(name, text):
    return lambda path: (path / name).write_text(text)


def setting(name, **values):
    """Change keys of a JSON file; None removes one."""

    def edit(path):
        content = json.loads((path / name).read_text()) | values
        (path / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def weights(change):
    """Change the weights: a function of their dict."""

    def edit(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


NAN = weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
NO_END = (
    setting("config.json", eos_token_id=None),
    setting("tokenizer_config.json", eos_token=None),
    remove("generation_config.json"),
)


def other_tokenizer(**options):
    return lambda path: make_tokenizer("<|im_end|>", **options).save_pretrained(path)


def without_merges(path):
    """The same vocabulary, but every byte its own token."""
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(content))


def in_the_way(name, content, inside=""):
    """An --out_dir in which, or in whose way, there is this file."""

    def prepare(folder, world):
        (folder / "old").mkdir()
        (folder / "old" / name).write_text(content)
        return str(folder / "old" / inside)

    return dict(out_dir=prepare)


OUT_OF_BOUNDS = dict(
    steps=[0, -5], batch_size=[0], micro_batch_size=[0], rollout_batch_size=[-1], max_new_tokens=[0],
    lr=[0, -1e-3, "nan", "inf"], temperature=[0, -1, "nan"], top_p=[0, 1.5], top_k=[-1],
    eval_problems=[-1], eval_temperature=[-0.5], warmup=[2], seed=[-1], save_every=[0],
)  # fmt: skip
BEFORE_MODELS = {
    # the command line
    "unknown flag": (dict(stepz=3), "unrecognized arguments: --stepz", "--help"),
    "abbreviated flag": (dict(step=3), "unrecognized arguments: --step", "--help"),
    "word for a number": (dict(steps="ten"), "--steps", "invalid int value: 'ten'"),
    "fraction for a count": (dict(batch_size="2.5"), "--batch_size", "invalid int value"),
    "flag that is neither yes nor no": (dict(thinking="perhaps"), "--thinking", "perhaps"),
    # arguments that no run can use
    "unknown estimator": (dict(estimator="k3"), "--estimator: invalid choice: 'k3'", "exact", "sampled"),
    "unknown precision": (dict(precision="fp16"), "--precision: invalid choice: 'fp16'", "auto", "fp32", "bf16"),
    "ends neither apart nor as one": (dict(ends="merged"), "--ends: invalid choice: 'merged'", "as_one"),
    "k > n": (dict(eval_k=4, eval_n=2), "--eval_k is 4", "--eval_n is 2"),
    "empty name in a list": (dict(eval_data=","), "cannot load ''"),
    # the output directory
    "no output directory": (dict(out_dir=""), "--out_dir"),
    "output under a file": (in_the_way("file", "x", "file/run"), "cannot write to --out_dir", "choose another"),
    "results of nobody knows what": (in_the_way("log.jsonl", "{}\n"), "no args.json", "another"),
    "damaged args.json": (in_the_way("args.json", '{"steps": '), "args.json is damaged", "--out_dir"),
    "args.json of something else": (in_the_way("args.json", "[1]"), "args.json is damaged", "--out_dir"),
    # data
    "no data file": (dict(data="nowhere.jsonl"), "cannot load 'nowhere.jsonl'", "No such file"),
    "empty file": (data("a.jsonl", "\n\n"), "a.jsonl: no rows"),
    "not JSON": (data("a.jsonl", '{"question": "a"}\n{"question": \n'), "a.jsonl, line 2'", "JSONDecodeError"),
    "JSON without columns": (data("a.jsonl", '{"question": "a"}\n["b"]\n'), "row 2", "object", "list"),
    "damaged parquet": (data("a.parquet", b"PAR1 not really"), "cannot load", "a.parquet"),
    "unknown kind of file": (data("a.xlsx", b"PK"), "cannot load", "a.xlsx", ".jsonl"),
    "not on the hub": (dict(data="no-such-organisation/no-such-data"), "'no-such-organisation/no-such-data'", "hub"),
    "wrong columns": (second_row({"text": "a", "label": 1}), "row 2: needs a `prompt`", "text, label"),
    "messages for a question": (second_row({"prompt": [{"role": "user"}]}), "row 2: `prompt` must be a text"),
    "empty question": (second_row({"question": " "}), "row 2: `question` must be a text"),
    "no answers to evaluate by": (second_row({"question": "a"}, "eval_data"), "row 2: needs an `answer`", "question"),
    "null answer": (second_row(ROW | {"answer": None}, "eval_data"), "row 2: needs an `answer`", "is null"),
    "list for an answer": (second_row(ROW | {"answer": [1]}, "eval_data"), "row 2: needs an `answer`", "is [1]"),
    "half a character": (second_row({"question": "broken \ud83d emoji"}), "broken"),
    "prompt longer than the context": (second_row({"question": "why " * 600}), "context of 512", "why why"),
    "responses longer than the context": (dict(max_new_tokens=512), "context of 512", "--max_new_tokens"),
    "evaluation longer than the context": (dict(eval_max_new_tokens=600), "context of 512", "--eval_max_new_tokens"),
    "a language that the toy does not speak": (
        dict(student=str(ROOT / "toy/student"), teacher=str(ROOT / "toy/teacher"), eval_max_new_tokens=6),
        "% of the prompts' tokens are unknown", "toy/teacher", "do not belong together",
    ),
    # models
    "no such student": (dict(student="no-such-organisation/no-such-model"), "student 'no-such", "is no folder here"),
    "folder of something else": (student(remove("config.json")), "no config.json", "student"),
    "folder without weights": (teacher(remove("model.safetensors")), "no weights", "teacher"),
    "config.json not JSON": (student(write("config.json", "{")), "the student", "config.json"),
    "unknown architecture": (student(setting("config.json", model_type="qwen99")), "qwen99"),
    "not a causal model": (teacher(write("config.json", '{"model_type": "vit"}')), "vit", "causal language model"),
    "bad generation_config.json": (teacher(write("generation_config.json", "{")), "generation_config.json", "delete"),
    "no tokenizer": (student(remove("tokenizer.json", "tokenizer_config.json")), "no tokenizer", "student"),
    "damaged tokenizer": (teacher(write("tokenizer.json", "{")), "the teacher", "Tokenizer"),
    "no chat template": (teacher(remove("chat_template.jinja")), "no chat template", "chat_template.jinja"),
    "bad chat template": (teacher(write("chat_template.jinja", "{% for m in %}")), "chat template fails"),
    "fewer tokens": (teacher(other_tokenizer(vocab_size=280)), "tokenizers of student", "one family"),
    "other merges": (teacher(other_tokenizer(corpus=["zebra " * 150])), "tokenizers of student", "one family"),
    "other tokenization": (student(without_merges), "tokenize the same prompt differently", "one family"),
    "few logits": (student(setting("config.json", vocab_size=290)), "ids up to 302", "'student': 290"),
    "no end token": (student(*NO_END) | teacher(*NO_END), "end token", "eos_token_id", "config.json"),
}  # fmt: skip
BEFORE_MODELS |= {
    f"{name} {value}": ({name: value}, f"--{name} is {value}", "must be")
    for name, values in OUT_OF_BOUNDS.items() for value in values
}  # fmt: skip
WITH_MODELS = {
    "weights cut short": (teacher(lambda path: halve(path / "model.safetensors")), "is damaged or incomplete", "again"),
    "other shape": (student(setting("config.json", intermediate_size=96)), "do not fit", "config", "mlp"),
    "a missing weight": (teacher(weights(lambda tensors: tensors.pop("model.norm.weight"))), "do not fit", "1 missing"),
}  # fmt: skip
NOT_FINITE = {"a diverging teacher": (teacher(NAN), "step 1", "nan"), "a diverging student": (student(NAN), "nan")}
ONLY_CURRICULUM = {
    "no lengths": (dict(lengths=""), "--lengths is ''"),
    "a length that is no number": (dict(lengths="4,x"), "--lengths is '4,x'"),
    "falling lengths": (dict(lengths="6,4"), "--lengths is '6,4'"),
    "lengths too long": (dict(lengths="128,256"), "--lengths is '128,256'"),
    "more lengths than steps": (dict(lengths="1,2,4,6"), "--steps is 3, but --lengths has 4 stages"),
    "all held out": (dict(lengths="2,4", held_out=12), "--held_out is 12, but", "has 12 rows"),
}
ALL = BEFORE_MODELS | WITH_MODELS | NOT_FINITE | ONLY_CURRICULUM
CASES = [("opd", name) for name in BEFORE_MODELS | WITH_MODELS]  # the siblings share the code, and a test says so
CASES += [("curriculum", name) for name in ONLY_CURRICULUM]


def contents(directory):
    """Every file under it, byte for byte."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def refusal(script, arguments):
    """What a script says when it refuses: SystemExit with a text prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        script.main(runs.parse(script.Args, argv(arguments)))
    line = end.value.code
    assert isinstance(line, str) and line.startswith("error: ") and line == " ".join(line.split())
    assert len(line) < 700, "that is not a line"
    return line


@pytest.fixture
def loaded(monkeypatch):
    """The checkpoints of which weights have been loaded."""
    paths, load = [], transformers.AutoModelForCausalLM.from_pretrained
    spy = lambda path, *args, **kwargs: paths.append(path) or load(path, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    return paths


def refused(script, name, world, folder, **more):
    """Run the case of that name, in folder/runs/new unless it says otherwise; compare what the line says."""
    changes, *says = ALL[name]
    changes = {key: value(folder, world) if callable(value) else value for key, value in changes.items()}
    before = contents(folder)
    arguments = {**world, "out_dir": str(folder / "runs" / "new"), **changes, **more}
    line = refusal(importlib.import_module(script), arguments)
    assert [fragment for fragment in says if fragment not in line] == [], line
    return before


@pytest.mark.parametrize("script, name", CASES)
def test_refused_before_the_run_starts(script, name, world, tmp_path, loaded, capfd):
    before = refused(script, name, world, tmp_path)
    assert bool(loaded) == (name in WITH_MODELS)
    assert contents(tmp_path) == before and not (tmp_path / "runs").exists()  # nothing lost, nothing left
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("script", ["opd", "sft_offpolicy"])
@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_refused_where_numbers_are_not_finite(script, name, estimator, world, tmp_path):
    refused(script, name, world, tmp_path, estimator=estimator)
    assert not (tmp_path / "runs" / "new" / "model").exists()


# ----------------------------------------------------------------------------------------------------------------
# A script of one's own: what it says of itself is checked, without an entry elsewhere


def sibling(tmp_path, monkeypatch, *edits):
    """A copy of opd.py with some lines changed, as a module."""
    text = (ROOT / "opd.py").read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return importlib.import_module("mine")


FIELD = "    seed: int = 0  # of everything random; >= 0\n"
NEW_FIELDS = FIELD + (
    "    alpha: float = 0.5  # a weight; > 0, <= 1\n"
    '    shape: Literal["round", "square"] = "round"  # of nothing\n'
)


def test_help_is_the_docstring_and_what_stands_behind_every_field(capsys):
    with pytest.raises(SystemExit):
        runs.parse(opd.Args, ["--help"])
    said = capsys.readouterr().out
    assert opd.__doc__ in said
    assert "--lr LR AdamW's learning rate, constant after the warm-up; > 0 (default: 0.0005)" in " ".join(said.split())


def test_new_fields_are_checked_by_what_they_say(tmp_path, monkeypatch):
    mine = sibling(tmp_path, monkeypatch, (FIELD, NEW_FIELDS))
    runs.check_args(mine.Args())
    with pytest.raises(SystemExit, match="--alpha is 1.5, and must be at most 1"):
        runs.check_args(mine.Args(alpha=1.5))
    with pytest.raises(SystemExit, match="--shape is 'oval', and must be one of: round, square"):
        runs.check_args(mine.Args(shape="oval"))


def test_an_edited_script_is_another_run_and_a_comment_is_not(world, tmp_path, monkeypatch, capsys):
    arguments = world | {"out_dir": str(tmp_path / "run")}
    mine = sibling(tmp_path, monkeypatch)
    mine.main(mine.Args(**arguments))
    before = contents(tmp_path / "run")
    mine = sibling(tmp_path, monkeypatch, ("# (3) Loss", "# (3) The loss"), ('"""On-policy', '"""A copy of on-policy'))
    with pytest.raises(SystemExit) as end:
        free = {"micro_batch_size": 1, "rollout_batch_size": 2, "save_every": 7}  # which change no result
        mine.main(mine.Args(**arguments | free))
    assert end.value.code == 0 and "finished" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
    for edit in (("reverse_kl, student", "forward_kl, student"), ("eval_k: int = 8", "eval_k: int = 4")):
        line = refusal(sibling(tmp_path, monkeypatch, edit), arguments)
        assert "mine.py has been changed" in line and "common.py" not in line
    assert {"mine.py", "common.py", "fast.py"} <= set(json.loads((tmp_path / "run/args.json").read_text())["code"])


def test_a_real_model_with_what_is_made_for_the_toy_is_warned_of(world, monkeypatch, capsys):
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self: 11_000_000)
    given = {"data": world["data"], "eval_data": "none", "lr": 1e-5}
    for left_out in (None, *given):
        some = {name: value for name, value in given.items() if name != left_out}
        models.load_model(world["student"], opd.Args(**some), trainable=True)
        printed = capsys.readouterr().out
        assert ("made for the toy" in printed) == (left_out is not None)
        assert left_out is None or re.search(rf"warning: --{left_out} \S+: made", printed)


@pytest.mark.parametrize(
    "world_size, changes, says",
    [
        (3, {}, "--batch_size is 4, and must be a multiple of the 3 processes"),
        (1, dict(teacher_device="cuda:99"), "must be a device here"),
        (1, dict(teacher_device="gpu"), "must be a device here"),
        (2, dict(teacher_device="cpu"), "torchrun shards the teacher"),
    ],
)
def test_processes_and_devices_that_do_not_fit(world_size, changes, says, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(SystemExit, match=says):
        runs.check_args(opd.Args(**world | changes))


# ----------------------------------------------------------------------------------------------------------------
# A run that exists keeps what it has


@pytest.fixture
def stopped(world, tmp_path, monkeypatch):
    """A run of 4 steps with its own teacher and data, stopped after the second; -> its arguments."""
    arguments = world | dict(
        teacher=str(shutil.copytree(world["teacher"], tmp_path / "teacher")),
        data=str(shutil.copy(world["data"], tmp_path / "train.jsonl")),
        out_dir=str(tmp_path / "run"), steps=4, eval_every=0,
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after step 2"):
        stop = property(lambda run: run.step == 2, lambda run, value: None)
        patch.setattr(runs.Run, "stop_asked", stop, raising=False)
        opd.main(opd.Args(**arguments))
    return arguments


@pytest.mark.parametrize(
    "changes, pattern, damage, says",
    [
        (dict(lr=0.5, seed=7), "", None, ["holds another run: --lr was 0.001, now 0.5", "--seed was 0, now 7"]),
        ({}, "train.jsonl", halve, ["JSONDecodeError"]),
        ({}, "teacher/config.json", Path.unlink, ["no config.json"]),
        ({}, "run/state-2/*.distcp", halve, ["state-2 is damaged", "to start afresh"]),
        ({}, "run/state-2/progress.json", Path.unlink, ["state-2 is damaged", "to start afresh"]),
    ],
)
def test_a_refused_command_leaves_a_run_as_it_is(changes, pattern, damage, says, stopped, tmp_path):
    if damage:
        damage(max(tmp_path.glob(pattern), key=lambda path: path.stat().st_size))
    before = contents(tmp_path)
    line = refusal(opd, stopped | changes)
    assert [fragment for fragment in says if fragment not in line] == [], line
    assert contents(tmp_path) == before


def test_a_run_does_not_go_on_with_other_data_nor_beside_another_process(stopped):
    data, text = Path(stopped["data"]), Path(stopped["data"]).read_text()
    before = contents(stopped["out_dir"])
    data.write_text(text.replace("Is 7 prime?", "Is 8 prime?"))
    assert "gives other prompts or answers" in refusal(opd, stopped)
    data.write_text(text)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, stopped["out_dir"] + "/lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert "another process is at work" in refusal(opd, stopped)
        other.communicate("")
    assert contents(stopped["out_dir"]) == before


def test_a_teacher_that_breaks_costs_no_progress(stopped, tmp_path):
    """Non-finite numbers end the run in one line; with a sound teacher it continues as if nothing had been."""
    out_dir, file = Path(stopped["out_dir"]), Path(stopped["teacher"], "model.safetensors")
    sound, state = file.read_bytes(), contents(out_dir / "state-2")
    NAN(file.parent)
    line = refusal(opd, stopped)
    assert "step 3" in line and "nan" in line
    assert contents(out_dir / "state-2") == state and not (out_dir / "model").exists()
    file.write_bytes(sound)
    opd.main(opd.Args(**stopped))
    opd.main(opd.Args(**stopped | {"out_dir": str(tmp_path / "uninterrupted")}))
    assert read_log(out_dir) == read_log(tmp_path / "uninterrupted")


# ----------------------------------------------------------------------------------------------------------------
# From the shell


def test_status_and_stderr(world, tmp_path):
    """What the process does: status 1, and one line on stderr."""
    arguments = argv({**world, "data": tmp_path / "a.jsonl", "out_dir": tmp_path / "run"})
    process = subprocess.run([sys.executable, "opd.py", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: cannot load") and process.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
