"""Bad input: one line that says what is wrong, exit status 1, nothing lost, and no model loaded for what is known before.

Each row of the table is one way to get it wrong: what is changed about a run that works, and what the line must say.
Values that are functions prepare a file or a checkpoint, (folder to write in, the working arguments) -> its path.
"""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT, make_tokenizer, read_log, write_jsonl
from safetensors.torch import load_file, save_file

import opd
from plumbing import models, runs

ROW = {"question": "What is 1+1?", "answer": "2"}


def file(name, content):
    """A data file: bytes, text, or a list of rows."""

    def prepare(folder, world):
        if isinstance(content, list):
            return write_jsonl(folder / name, content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / name)

    return prepare


def rows(*more):
    return file("rows.jsonl", [ROW, *more])


def checkpoint(role, *edits):
    """A copy of the working student or teacher with some of its files changed."""

    def prepare(folder, world):
        path = shutil.copytree(world[role], folder / role)
        for edit in edits:
            edit(path)
        return str(path)

    return prepare


def remove(*names):
    return lambda path: [(path / name).unlink() for name in names]


def write(name, text):
    return lambda path: (path / name).write_text(text)


def truncate(name, size):
    return lambda path: os.truncate(path / name, size)


def setting(name, **values):
    """Change keys of a JSON file; None removes one."""

    def edit(path):
        content = json.loads((path / name).read_text()) | values
        (path / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def tensors(change):
    """Change the weights: a function of their dict."""

    def edit(path):
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def other_tokenizer(**options):
    return lambda path: make_tokenizer("<|im_end|>", **options).save_pretrained(path)


def without_merges(path):
    """The same vocabulary, but every byte its own token."""
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(content))


def no_end_token(role):
    return checkpoint(
        role,
        setting("config.json", eos_token_id=None),
        setting("tokenizer_config.json", eos_token=None),
        remove("generation_config.json"),
    )


def nan_weights(weights):
    weights["model.norm.weight"].fill_(math.nan)


def a_file_in_the_way(folder, world):
    (folder / "file").write_text("x")
    return str(folder / "file" / "run")


def folder_with(name, content):
    def prepare(folder, world):
        (folder / "old").mkdir()
        (folder / "old" / name).write_text(content)
        return str(folder / "old")

    return prepare


BEFORE_MODELS = {
    # the command line
    "unknown flag": (dict(stepz=3), "unknown argument --stepz", "--help"),
    "abbreviated flag": (dict(step=3), "unknown argument --step", "--help"),
    "word for a number": (dict(steps="ten"), "--steps", "invalid int value: 'ten'"),
    "fraction for a count": (dict(batch_size="2.5"), "--batch_size", "invalid int value"),
    "flag without a value": (dict(lr=None), "--lr", "expected one argument"),
    "flag that is neither yes nor no": (dict(thinking="perhaps"), "--thinking", "perhaps"),
    # arguments that no run can use
    "no steps": (dict(steps=0), "--steps is 0", "at least 1"),
    "negative steps": (dict(steps=-5), "--steps is -5", "at least 1"),
    "empty batches": (dict(batch_size=0), "--batch_size is 0"),
    "empty micro-batches": (dict(micro_batch_size=0), "--micro_batch_size is 0"),
    "no new tokens": (dict(max_new_tokens=0), "--max_new_tokens is 0"),
    "learning rate 0": (dict(lr=0), "--lr is 0", "above 0"),
    "negative learning rate": (dict(lr=-1e-3), "--lr is -0.001"),
    "learning rate nan": (dict(lr="nan"), "--lr is nan", "finite"),
    "learning rate infinite": (dict(lr="inf"), "--lr is inf", "finite"),
    "temperature 0": (dict(temperature=0), "--temperature is 0", "above 0"),
    "negative temperature": (dict(temperature=-1), "--temperature is -1"),
    "temperature nan": (dict(temperature="nan"), "--temperature is nan"),
    "negative evaluation temperature": (dict(eval_temperature=-0.5), "--eval_temperature is -0.5"),
    "top_p 0": (dict(top_p=0), "--top_p is 0", "above 0"),
    "top_p 1.5": (dict(top_p=1.5), "--top_p is 1.5", "at most 1"),
    "negative top_k": (dict(top_k=-1), "--top_k is -1"),
    "warm-up 2": (dict(warmup=2), "--warmup is 2", "at most 1"),
    "negative seed": (dict(seed=-1), "--seed is -1"),
    "never save": (dict(save_every=0), "--save_every is 0"),
    "unknown estimator": (dict(estimator="k3"), "--estimator: invalid choice: 'k3'", "exact", "sampled"),
    "unknown precision": (dict(precision="fp16"), "--precision: invalid choice: 'fp16'", "auto", "fp32", "bf16"),
    "ends neither apart nor as one": (dict(ends="merged"), "--ends: invalid choice: 'merged'", "as_one"),
    "negative slices": (dict(rollout_batch_size=-1), "--rollout_batch_size is -1", "at least 0"),
    "negative subset": (dict(eval_problems=-1), "--eval_problems is -1", "at least 0"),
    "k > n": (dict(eval_k=4, eval_n=2), "--eval_k is 4", "--eval_n is 2"),
    "empty name in a list": (dict(eval_data="a.jsonl,,b.jsonl"), "--eval_data", "a.jsonl,,b.jsonl"),
    "same name twice": (dict(eval_data="a.jsonl,a.jsonl"), "--eval_data", "only once"),
    # the output directory
    "no output directory": (dict(out_dir=""), "--out_dir"),
    "output under a file": (dict(out_dir=a_file_in_the_way), "cannot write to --out_dir", "choose another"),
    "results of nobody knows what": (dict(out_dir=folder_with("log.jsonl", "{}\n")), "no args.json", "another"),
    "damaged args.json": (dict(out_dir=folder_with("args.json", '{"steps": ')), "args.json is damaged", "--out_dir"),
    "args.json of something else": (dict(out_dir=folder_with("args.json", "[1]")), "args.json is damaged", "--out_dir"),
    # data
    "no data file": (dict(data="nowhere.jsonl"), "no data file 'nowhere.jsonl'", "give a file"),
    "no evaluation file": (dict(eval_data="nowhere.jsonl"), "no data file 'nowhere.jsonl'", "give a file"),
    "directory for data": (dict(data=lambda folder, world: str(folder)), "is a directory", "give a data file"),
    "no data name": (dict(data=""), "--data", "empty name"),
    "empty file": (dict(data=file("a.jsonl", "\n\n")), "a.jsonl: no rows"),
    "not JSON": (dict(data=file("a.jsonl", '{"question": "a"}\n{"question": \n')), "a.jsonl, line 2: not JSON"),
    "JSON without columns": (dict(data=file("a.jsonl", '{"question": "a"}\n["b"]\n')), "row 2", "object", "list"),
    "a table that is not a list": (dict(data=file("a.json", '{"question": "a"}')), "a.json: needs a list of rows"),
    "damaged .json": (dict(data=file("a.json", "[{]")), "a.json: not JSON"),
    "binary file": (dict(data=file("a.jsonl", b"\x89PNG\r\n\x1a\n\xff\xfe")), "cannot read", "a.jsonl", "as text"),
    "damaged parquet": (dict(data=file("a.parquet", b"PAR1 not really")), "cannot load", "a.parquet"),
    "unknown kind of file": (dict(data=file("a.xlsx", b"PK")), "a.xlsx: do not know", ".jsonl"),
    "not on the hub": (dict(data="no-such-organisation/no-such-data"), "'no-such-organisation/no-such-data'", "hub"),
    "wrong columns": (dict(data=rows({"text": "a", "label": 1})), "row 2: needs a `prompt`", "text, label"),
    "messages for a question": (dict(data=rows({"prompt": [{"role": "user"}]})), "row 2: `prompt` must be a text"),
    "empty question": (dict(data=rows({"question": " "})), "row 2: `question` must be a text"),
    "no answers to evaluate by": (dict(eval_data=rows({"question": "a"})), "row 2: needs an `answer`", "question"),
    "null answer": (dict(eval_data=rows({"question": "a", "answer": None})), "row 2: needs an `answer`", "is null"),
    "list for an answer": (dict(eval_data=rows({"question": "a", "answer": [1]})), "row 2: needs an `answer`", "is [1]"),
    "half a character": (dict(data=rows({"question": "broken \ud83d emoji"})), "broken"),
    "prompt longer than the context": (dict(data=rows({"question": "why " * 600})), "context of 512", "why why"),
    "responses longer than the context": (dict(max_new_tokens=512), "context of 512", "--max_new_tokens"),
    "evaluation longer than the context": (dict(eval_max_new_tokens=600), "context of 512", "--eval_max_new_tokens"),
    "a language that the toy does not speak": (
        dict(student=str(ROOT / "toy/student"), teacher=str(ROOT / "toy/teacher"), eval_max_new_tokens=6),
        "% of the prompts' tokens are unknown", "toy/teacher", "do not belong together",
    ),
    # models
    "no such student": (dict(student="no-such-organisation/no-such-model"), "the student 'no-such", "is no folder here"),
    "no such folder": (dict(teacher="/no/such/folder"), "the teacher '/no/such/folder'", "is no folder here"),
    "empty name of a model": (dict(student=""), "the student ''", "is no folder here"),
    "folder of something else": (dict(student=checkpoint("student", remove("config.json"))), "no config.json", "student"),
    "folder without weights": (dict(teacher=checkpoint("teacher", remove("model.safetensors"))), "no weights", "teacher"),
    "config.json not JSON": (dict(student=checkpoint("student", write("config.json", "{"))), "the student", "config.json"),
    "unknown architecture": (dict(student=checkpoint("student", setting("config.json", model_type="qwen99"))), "qwen99"),
    "not a causal model": (
        dict(teacher=checkpoint("teacher", write("config.json", '{"model_type": "vit"}'))), "vit", "causal language model",
    ),
    "impossible config": (
        dict(student=checkpoint("student", setting("config.json", vocab_size="many"))), "the student", "again", "vocab",
    ),
    "damaged generation_config.json": (
        dict(teacher=checkpoint("teacher", write("generation_config.json", "{"))), "generation_config.json", "delete",
    ),
    "no tokenizer": (
        dict(student=checkpoint("student", remove("tokenizer.json", "tokenizer_config.json"))), "no tokenizer", "student",
    ),
    "damaged tokenizer": (dict(teacher=checkpoint("teacher", write("tokenizer.json", "{"))), "the teacher", "Tokenizer"),
    "no chat template": (
        dict(teacher=checkpoint("teacher", remove("chat_template.jinja"))), "no chat template", "chat_template.jinja",
    ),
    "damaged chat template": (
        dict(teacher=checkpoint("teacher", write("chat_template.jinja", "{% for m in %}"))), "chat template fails",
    ),
    "other tokens": (
        dict(teacher=checkpoint("teacher", other_tokenizer(vocab_size=280))), "the tokenizers of student", "one family",
    ),
    "other merges": (
        dict(teacher=checkpoint("teacher", other_tokenizer(corpus=["zebra zebra zebra"] * 50))), "tokenizers", "one family",
    ),
    "same tokens, other tokenization": (
        dict(student=checkpoint("student", without_merges)), "tokenize the same prompt differently", "one family",
    ),
    "more tokens than logits": (
        dict(student=checkpoint("student", setting("config.json", vocab_size=290))), "ids up to 302", "'student': 290",
    ),
    "no end token": (
        dict(student=no_end_token("student"), teacher=no_end_token("teacher")), "end token", "eos_token_id", "config.json",
    ),
}  # fmt: skip
WITH_MODELS = {
    "weights not fetched": (
        dict(student=checkpoint("student", write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"))),
        "is damaged or incomplete", "again",
    ),
    "weights cut short": (
        dict(teacher=checkpoint("teacher", truncate("model.safetensors", 20_000))), "is damaged or incomplete", "again",
    ),
    "weights of another shape": (
        dict(student=checkpoint("student", setting("config.json", intermediate_size=96))), "do not fit", "config", "mlp",
    ),
    "a missing weight": (
        dict(teacher=checkpoint("teacher", tensors(lambda w: w.pop("model.norm.weight")))), "do not fit", "1 missing",
    ),
}  # fmt: skip
NOT_FINITE = {
    "a diverging teacher": (dict(teacher=checkpoint("teacher", tensors(nan_weights))), "step 1", "nan"),
    "a diverging student": (dict(student=checkpoint("student", tensors(nan_weights))), "nan"),
}
IN_SFT = [
    "unknown flag", "k > n", "not JSON", "weights cut short", "same tokens, other tokenization", "a missing weight",
]  # fmt: skip


def command_line(arguments):
    return [part for key, value in arguments.items() for part in (f"--{key}", *([] if value is None else [str(value)]))]


def contents(directory):
    """Every file under it, byte for byte."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def refusal(script, argv):
    """What a script says when it refuses: SystemExit with a text prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        script.main(runs.parse(script.Args, argv))
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


def prepared(changes, world, folder):
    """Arguments of a run that goes wrong, in out_dir folder/runs/new unless they say otherwise."""
    changes = {key: value(folder, world) if callable(value) else value for key, value in changes.items()}
    return {**world, "out_dir": str(folder / "runs" / "new"), **changes}


def in_scripts(table):
    """Every row with opd, and some with sft_offpolicy."""
    return [("opd", name) for name in table] + [("sft_offpolicy", name) for name in table if name in IN_SFT]


@pytest.mark.parametrize("script, name", in_scripts(BEFORE_MODELS) + in_scripts(WITH_MODELS))
def test_refused_before_the_run_starts(script, name, world, tmp_path, loaded, capfd):
    changes, *says = BEFORE_MODELS.get(name) or WITH_MODELS[name]
    arguments = prepared(changes, world, tmp_path)
    before = contents(tmp_path)
    line = refusal(importlib.import_module(script), command_line(arguments))
    for fragment in says:
        assert fragment in line
    assert bool(loaded) == (name in WITH_MODELS)
    assert contents(tmp_path) == before and not (tmp_path / "runs").exists()  # nothing lost, nothing left
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("script", ["opd", "sft_offpolicy"])
@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_refused_where_numbers_are_not_finite(script, name, estimator, world, tmp_path):
    changes, *says = NOT_FINITE[name]
    arguments = prepared(changes, world, tmp_path) | {"estimator": estimator}
    line = refusal(importlib.import_module(script), command_line(arguments))
    for fragment in says:
        assert fragment in line
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


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("alpha", 0.0, "--alpha is 0.0, and must be above 0"),
        ("alpha", 1.5, "--alpha is 1.5, and must be at most 1"),
        ("alpha", math.nan, "--alpha is nan, and must be a finite number"),
        ("shape", "oval", "--shape is 'oval', and must be one of: round, square"),
    ],
)
def test_new_fields_are_checked_by_what_they_say(field, value, says, tmp_path, monkeypatch):
    mine = sibling(tmp_path, monkeypatch, (FIELD, NEW_FIELDS))
    runs.check_args(mine.Args())
    with pytest.raises(SystemExit, match=says):
        runs.check_args(mine.Args(**{field: value}))


def test_a_divergence_that_cannot_be_sampled(world, tmp_path, monkeypatch, loaded):
    """Total variation has no `u`: refused with --estimator sampled, and good enough without it."""
    plain = (
        "def total_variation(student_logits, teacher_logits):\n"
        "    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2\n\n\n@dataclass\nclass Args"
    )
    edits = ("reverse_kl, student,", "total_variation, student,"), ("@dataclass\nclass Args", plain)
    mine = sibling(tmp_path, monkeypatch, *edits)
    arguments = world | {"out_dir": str(tmp_path / "run")}
    line = refusal(mine, command_line(arguments | {"estimator": "sampled"}))
    assert "total_variation has no argument `u`" in line and not loaded
    mine.main(mine.Args(**arguments))
    assert (tmp_path / "run/model").exists()


def test_an_edited_script_is_another_run_and_a_comment_is_not(world, tmp_path, monkeypatch, capsys):
    arguments = world | {"out_dir": str(tmp_path / "run")}
    mine = sibling(tmp_path, monkeypatch)
    mine.main(mine.Args(**arguments))
    mine = sibling(tmp_path, monkeypatch, ("# (3) Loss", "# (3) The loss"), ('"""On-policy', '"""A copy of on-policy'))
    with pytest.raises(SystemExit) as end:
        mine.main(mine.Args(**arguments))
    assert end.value.code == 0 and "finished" in capsys.readouterr().out
    mine = sibling(tmp_path, monkeypatch, ("reverse_kl, student,", "forward_kl, student,"))
    line = refusal(mine, command_line(arguments))
    assert "mine.py has been changed" in line and "common.py" not in line


def test_a_real_model_with_the_toys_learning_rate_is_warned_of(world, monkeypatch, capsys):
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self: 11_000_000)
    for lr, warned in ((opd.Args.lr, True), (1e-5, False)):
        models.load_model(world["student"], opd.Args(lr=lr), trainable=True)
        assert ("is made for the toy" in capsys.readouterr().out) == warned


def test_batches_divide_among_processes(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="--batch_size is 4, and must be a multiple of the 3 processes"):
        runs.check_args(opd.Args(**world))


@pytest.mark.parametrize(
    "changes",
    [dict(lengths=""), dict(lengths="4,x"), dict(lengths="8,4"), dict(lengths="128,256"), dict(steps=3, lengths="2,4,6,8")],
)
def test_lengths_rise(changes):
    import curriculum

    with pytest.raises(SystemExit, match="--lengths"):
        curriculum.ladder_of(curriculum.Args(**changes))


def test_held_out_prompts_are_fewer_than_all(world, tmp_path):
    import curriculum

    with pytest.raises(SystemExit, match="--held_out is 12, but .* has 12 rows"):
        curriculum.main(curriculum.Args(**world | dict(held_out=12, lengths="2,4", out_dir=str(tmp_path / "run"))))


def test_latex_answers_need_math_verify(world, tmp_path, monkeypatch, loaded):
    """The line is what to type. A set with numbers and words only does not need the package."""
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    data = write_jsonl(tmp_path / "a.jsonl", [ROW, {"question": "Solve.", "answer": "x^2"}])
    line = refusal(opd, command_line({**world, "eval_data": data, "out_dir": tmp_path / "run"}))
    assert "'x^2'" in line and "pip install math-verify" in line and not loaded


# ----------------------------------------------------------------------------------------------------------------
# A run that exists keeps what it has


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run of 4 steps with its own teacher and data, stopped after the second; -> its arguments."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = world | dict(
        teacher=str(shutil.copytree(world["teacher"], folder / "teacher")),
        data=str(shutil.copy(world["data"], folder / "train.jsonl")),
        out_dir=str(folder / "run"), steps=4, eval_every=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "stop_asked", property(lambda run: run.step == 2, lambda run, value: None), raising=False)
        with pytest.raises(SystemExit, match="stopped after step 2"):
            opd.main(opd.Args(**arguments))
    return arguments


def damaged(which, damage):
    """Damage one of the run's files: which of `arguments`, or a pattern in its directory (the largest that fits)."""

    def prepare(out_dir, arguments):
        files = [Path(arguments[which])] if which in arguments else out_dir.glob(which)
        damage(max(files, key=lambda path: path.stat().st_size))

    return prepare


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "changes, damage, says",
    [
        (dict(lr=0.5), None, ["holds another run: --lr was 0.001, now 0.5", "--out_dir"]),
        (dict(steps=9, seed=7), None, ["--steps was 4, now 9", "--seed was 0, now 7"]),
        (dict(data="gone.jsonl"), None, ["--data was"]),
        (dict(eval_k=0), None, ["--eval_k is 0"]),
        ({}, damaged("data", halve), ["not JSON"]),
        ({}, damaged("teacher", lambda path: (path / "config.json").unlink()), ["no config.json"]),
        ({}, damaged("args.json", halve), ["args.json is damaged", "to start afresh"]),
        ({}, damaged("state-2/*.distcp", halve), ["state-2 is damaged", "to start afresh"]),
        ({}, damaged("state-2/*.distcp", Path.unlink), ["state-2 is damaged", "to start afresh"]),
        ({}, damaged("state-2/.metadata", halve), ["state-2 is damaged", "to start afresh"]),
        ({}, damaged("state-2/progress.json", Path.unlink), ["state-2 is damaged", "to start afresh"]),
    ],
)
def test_a_refused_command_leaves_a_run_as_it_is(changes, damage, says, stopped, tmp_path):
    out_dir = Path(stopped["out_dir"])
    shutil.copytree(out_dir.parent, tmp_path / "sound")
    try:
        if damage:
            damage(out_dir, stopped)
        before = contents(out_dir)
        line = refusal(opd, command_line(stopped | changes))
        for fragment in says:
            assert fragment in line
        assert contents(out_dir) == before
    finally:
        shutil.copytree(tmp_path / "sound", out_dir.parent, dirs_exist_ok=True)


def test_a_teacher_that_breaks_costs_no_progress(world, stopped, tmp_path):
    """Non-finite numbers end the run in one line; with a sound teacher it continues as if nothing had been."""
    out_dir, weights = Path(stopped["out_dir"]), Path(stopped["teacher"], "model.safetensors")
    sound, state = weights.read_bytes(), contents(out_dir / "state-2")
    tensors(nan_weights)(weights.parent)
    line = refusal(opd, command_line(stopped))
    assert "step 3" in line and "nan" in line
    assert contents(out_dir / "state-2") == state and not (out_dir / "model").exists()
    weights.write_bytes(sound)
    opd.main(opd.Args(**stopped))
    opd.main(opd.Args(**stopped | {"out_dir": str(tmp_path / "uninterrupted")}))
    assert read_log(out_dir) == read_log(tmp_path / "uninterrupted")


# ----------------------------------------------------------------------------------------------------------------
# From the shell


def test_status_and_stderr(world, tmp_path):
    """What the process does: status 1, and one line on stderr. Started together, because importing takes seconds."""
    bad_data = file("a.jsonl", "not JSON")(tmp_path, world)
    commands = {
        "a.jsonl, line 1: not JSON": [
            "opd.py",
            *command_line({**world, "data": bad_data, "out_dir": tmp_path / "run"}),
        ],
        "unknown argument --stepz": ["sft_offpolicy.py", "--stepz", "3"],
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    processes = [subprocess.Popen([sys.executable, *command], **pipes) for command in commands.values()]
    for says, process in zip(commands, processes):
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "run").exists()
