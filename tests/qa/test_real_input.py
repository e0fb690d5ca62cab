"""The same scripts on input as it comes: published data formats, other architectures, the conventions of Qwen3."""

import gzip
import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
import transformers
from conftest import DISTILLATION, ROOT, arguments_of, make_checkpoint, read_log, run, write_jsonl

import opd
from plumbing import models
from plumbing.arguments import check_args, parse
from plumbing.data import Problem, load_problem_sets, load_problems
from plumbing.grading import grade
from plumbing.run import Run

GSM8K = {"question": "How many altogether?", "answer": "48+24 = <<48+24=72>>72.\n#### 72", "response": "#### 72"}
MATH = {"problem": "Find $3 \\cdot 4$.", "solution": "It is $\\boxed{12}$.", "answer": "12", "level": 2}
AMC = {"id": 0, "problem": "How many miles?", "answer": 27.0, "question": "How many miles?"}
AIME = {"id": 60, "problem": "Find the number of minutes.", "answer": "025", "url": "x"}


@pytest.mark.parametrize("row, answer", [(GSM8K, "72"), (MATH, "12"), (AMC, "27.0"), (AIME, "025")])
def test_published_data_in_files_of_every_kind_and_from_the_hub(row, answer, tmp_path, monkeypatch):
    table, asked, load = pandas.DataFrame([row, row]), [], datasets.load_dataset
    put = lambda name, data: (tmp_path / name).write_bytes(data)
    lines = Path(write_jsonl(tmp_path / "a.jsonl", [row, row])).read_bytes()
    put("lines.json", b"\xef\xbb\xbf" + lines)
    put("a.ndjson", lines)
    put("A.JSONL", lines)
    put("a.jsonl.gz", gzip.compress(lines))
    put("list.json", json.dumps([row, row], indent=1).encode())
    put("data.json", json.dumps({"version": 1, "data": [row, row]}, indent=1).encode())
    put("data.json.gz", gzip.compress(json.dumps({"data": [row, row]}).encode()))
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    datasets.Dataset.from_list([row, row]).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row, row])}).save_to_disk(tmp_path / "splits")
    for n in (1, 2):
        write_jsonl(tmp_path / f"part-{n}.jsonl", [row])
    hub = lambda path, *more, **options: asked.append((path, *more, *options.values())) or [row, row]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **o: (load if "data_files" in o else hub)(*a, **o))
    local = [path for path in tmp_path.iterdir() if not path.name.startswith("part")]
    assert len(local) == 13
    local += [tmp_path / "part-*.jsonl", f"{tmp_path}/splits::train"]
    for wrong in ("saved:test", "saved::test", "splits:train"):
        with pytest.raises(SystemExit, match="FOLDER::SPLIT"):
            load_problems(f"{tmp_path}/{wrong}")
    for path in (*local, "openai/gsm8k:main:test", "math-ai/amc23::test", "zwhe99/DeepMath"):
        problems, columns, _ = load_problems(str(path), needs="answer")
        assert columns["question"] == ("problem" if "problem" in row else "question") and columns["answer"] == "answer"
        assert [(p.question, p.level) for p in problems] == [
            (row[columns["question"]], "2" if "level" in row else None)
        ] * 2
        assert float(problems[1].answer) == float(answer), "a CSV has numbers, so 025 is 25"
        assert grade(f"... so it is \\boxed{{{float(answer):g}}}.", problems[1].answer)
    assert asked[0] == ("openai/gsm8k", "main", "test") and asked[1][1:] == (None, "test") and asked[2][2] == "train"


USER, SYSTEM = {"role": "user", "content": "Is 7 prime?"}, {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SAID = {"role": "assistant", "content": "Yes."}
ASKED = "<|im_start|>user\nIs 7 prime?<|im_end|>\n"
CONVERSATIONS = {  # a row: what stands before the question, the response, the answer
    "messages": ({"messages": [SYSTEM, USER, SAID]}, "system\nBe brief.", "Yes.", None),
    "several turns": ({"messages": [*FIRST, USER, SAID], "id": 1}, "assistant\nHello.", "Yes.", None),
    "TRL: prompt and completion": ({"prompt": [USER], "completion": [SAID]}, None, "Yes.", None),
    "a response as it stands": ({"prompt": " Is 7 prime?\n", "response": "\n Yes. "}, None, "\n Yes. ", None),
    "TRL: texts": ({"prompt": "Is 7 prime?", "completion": "Yes."}, None, "Yes.", None),
    "verl": ({"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "1"}}, None, None, "1"),
    "a solution is no response": ({"problem": "Is 7 prime?", "solution": "So \\boxed{1}."}, None, None, "1"),
    "final_answer": ({"problem": "Is 7 prime?", "solution": "So.", "final_answer": 1}, None, None, "1"),
    "a column that is never filled": ({"prompt": None, "question": "Is 7 prime?"}, None, None, None),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_conversations_and_columns_as_trainers_have_them(kind, world, tmp_path):
    row, before, response, answer = CONVERSATIONS[kind]
    problems, *_ = load_problems(write_jsonl(tmp_path / "a.jsonl", [row, row]), needs="answer" if answer else "")
    assert [(p.question, p.response, p.answer) for p in problems] == [("Is 7 prime?", response, answer)] * 2
    prompt = ask(world["student"], world["teacher"], problems=problems)[0]
    assert ASKED in prompt and (not before or f"<|im_start|>{before}<|im_end|>\n{ASKED}" in prompt)


def test_columns_can_be_named_and_rows_without_what_is_needed_are_counted(tmp_path, capsys):
    rows = [{"prompt": "p", "task": "t", "said": "s", "answer": a} for a in ("1", "", None, float("nan"), 0)]
    rows += [
        {"task": " ", "answer": 1},
        {"task": "t", "answer": "The answer is 5."},
        {"task": "t", "answer": "so the sky is blue"},
        {"task": "t", "answer": "all real numbers"},
        {"task": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": None}], "answer": 1},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    problems, columns, _ = load_problems(path, needs="answer", columns="question=task,response=said")
    assert [(p.question, p.answer, p.response) for p in problems[:2]] == [("t", "1", "s"), ("t", "0", "s")]
    assert columns["question"] == "task" and problems[2].answer == "all real numbers" and len(problems) == 3
    says = "left out 5 rows without an answer that can be graded, 1 rows without a question of the user's, 1 rows that"
    assert says in capsys.readouterr().out
    assert [p.question for p in load_problems(path)[0]] == ["p"] * 5, "one column for the whole file"
    train = write_jsonl(tmp_path / "named.jsonl", [{"task": 5, "answer": 1}])
    assert load_problem_sets(path, 0, "question=task")[path][0].question == "t", "where it is there"
    assert load_problem_sets(train, 0, "question=task", chosen=[columns])[train][0].question == "5"
    with pytest.raises(SystemExit, match="--columns response=said: .* such as question=task, answer=answer"):
        load_problem_sets(train, 0, "question=task,response=said")
    csv = tmp_path / "a.csv"
    csv.write_text("question,answer\na,NA\nb,None\nc,1\nd,\n", encoding="utf-8")
    assert [p.answer for p in load_problems(str(csv))[0]] == [None, None, "1", None]


@pytest.mark.parametrize("named", ["data", "eval_data"])
def test_columns_may_be_those_of_either_file(named, world, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"task": "Is 7 prime?", "answer": "1"}])
    begun = Run(opd.Args(**world | {named: path}, columns="question=task", out_dir=str(tmp_path / "run")))
    found = begun.problems if named == "data" else begun.problem_sets[path]
    assert [p.question for p in found] == ["Is 7 prime?"]


def ask(student, teacher, *argv, problems=None):
    """-> the prompt that the first question becomes, as text; and what the models have in common."""
    problems = problems or [Problem("Is 7 prime?")]
    tokens = models.load_tokens(
        parse(opd.Args, [f"--student={student}", f"--teacher={teacher}", *argv]), [("data", problems, 8)]
    )
    return tokens.tokenizer.decode(problems[0].prompt), tokens


def test_a_response_is_a_text_that_finishes_unless_it_says_otherwise_or_ids_as_they_are(world, tmp_path, capsys):
    rows = [{"response": "Yes."}, {"response": "Yes.", "ended": False}, {"response": "Yes.", "response_ids": [7, 8]}]
    rows += [{"response": "Yes.", "response_ids": []}, {"response": ""}, {"response": None}, {"response_ids": []}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Is 7 prime?"} | row for row in rows])
    problems = load_problems(path, needs="response")[0]
    yes = ask(world["student"], world["teacher"], problems=problems)[1].tokenizer("Yes.")["input_ids"]
    assert [p.response_ids for p in problems] == [[*yes, 302], yes, [7, 8], [*yes, 302]], "302: the teacher's end token"
    assert [p.ended for p in problems] == [True, False, True, True]
    assert "left out 3 rows without a response" in capsys.readouterr().out, "no empty response is trained on"


@pytest.mark.parametrize("script", ["opd", "sft_offpolicy"])
@pytest.mark.parametrize(
    "student, teacher",
    [
        (dict(arch="Llama", tied=False), dict(arch="Llama", tied=True, hidden=48)),
        (dict(arch="Qwen3", tied=True, padded=5), dict(arch="Llama", tied=False, padded=21)),
        (dict(arch="Llama", tied=True, padded=9), dict(arch="Qwen3", tied=False, padded=9)),
    ],
)
def test_any_causal_lm_checkpoint(script, student, teacher, tmp_path, capsys):
    """Two architectures, tied and untied heads, rows that pad the vocabulary and would win, end tokens in three
    places, as Qwen has them, and a generation_config that nobody is to sample by."""
    paths, evals = {}, [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((GSM8K, MATH, AMC))]
    for role, options, eos in (("student", student, "<|endoftext|>"), ("teacher", teacher, "<|im_end|>")):
        paths[role] = make_checkpoint(tmp_path / role, eos=eos, eos_token_id=5, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(paths[role])
        model.get_output_embeddings().weight.data[303:] *= 30
        model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, eos_token_id=[6, 7])
        model.save_pretrained(paths[role])
    more = dict(steps=2, batch_size=4, max_new_tokens=8, eval_max_new_tokens=8, eval_k=2, out_dir=tmp_path / "run")
    run(script, **paths, data=write_jsonl(tmp_path / "train.jsonl", [GSM8K] * 6), eval_data=",".join(evals), **more)
    row = read_log(tmp_path / "run")[2]
    assert 3 < row["eval_entropy"] < 6 and 3 < row["entropy"] < 6 and {f"avg_at_k/{name}" for name in evals} < set(row)
    said = [json.loads(line)["response_ids"] for line in (tmp_path / "run/responses-2.jsonl").open(encoding="utf-8")]
    assert len(said) == 6 and max(map(max, said)) < 303
    assert ("cropped to the tokenizer's 303" in capsys.readouterr().out) == ("padded" in student)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert saved.config.model_type == student["arch"].lower() and saved.config.tie_word_embeddings == student["tied"]
    assert saved.config.vocab_size == 303 + student.get("padded", 0), "training does not resize a model"
    assert set(saved.generation_config.eos_token_id) == {5, 6, 7, 300, 302}, "who samples from it stops as we did"


@pytest.fixture
def copied(world, tmp_path):
    """A copy of the student, to be changed."""
    return shutil.copytree(world["student"], tmp_path / "student")


def test_the_prompt_is_the_teachers_template_with_what_was_asked_for(world, copied):
    """Thinking is off unless asked for. A template that tells the date, as Llama 3's, always tells the same."""
    prompt = lambda *argv: ask(world["student"], copied, *argv)[0]
    asked = "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt(), prompt("--thinking=true")) == (asked + "<think>\n\n</think>\n\n", asked)
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    (copied / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert prompt("--instruction=Box it.") == "26 Jul 2024: Is 7 prime?\nBox it."


def test_rows_that_no_prompt_can_be_made_of_are_left_out_and_counted(world, copied, capsys):
    """A control token in a text would end the turn; a prompt must leave room in the context. Beyond longrope's first
    length the cache's keys are others than a pass without a cache would have."""
    rows = [Problem("Is 7 prime?"), Problem("Is it? <|im_end|>"), Problem("why " * 600), Problem("a " * 60)]
    rows += [Problem("a", response="b<|im_end|>"), Problem("a", before=({"role": "user", "content": "<|im_start|>"},))]
    ask(world["student"], copied, problems=rows)
    assert [p.question for p in rows] == ["Is 7 prime?", "a " * 60]
    said = capsys.readouterr().out
    assert "data: left out 3 rows that have control tokens" in said
    assert "data: left out 1 rows that are too long for the context of 512" in said
    config, long = json.loads((copied / "config.json").read_text(encoding="utf-8")), [1.0] * 4
    rope = dict(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64, long_factor=long, short_factor=long
    )
    (copied / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}), encoding="utf-8")
    ask(world["student"], copied, problems=rows)
    assert [p.question for p in rows] == ["Is 7 prime?"]


def test_a_switch_for_thinking_that_a_template_does_not_have_is_said(world, copied, capsys):
    ask(world["student"], world["teacher"], "--thinking=true")
    assert "--thinking" not in capsys.readouterr().out
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    ask(world["student"], copied, "--thinking=true")
    assert "warning: --thinking changes nothing" in capsys.readouterr().out


def test_vocabularies_are_cropped_to_the_tokenizer_and_a_token_for_images_may_lie_beyond(copied, tmp_path):
    """Gemma 3's tokenizer has one, and its small models no row for it."""
    larger = make_checkpoint(tmp_path / "larger", padded=5)
    assert [ask(*pair)[1].vocab_size for pair in ((copied, larger), (larger, copied), (larger, larger))] == [303] * 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(copied)
    assert ask(copied, larger)[1].vocab_size == ask(copied, copied)[1].vocab_size == 303 == len(tokenizer) - 1
    with pytest.raises(SystemExit, match="ids up to 303"):
        ask(copied, copied, problems=[Problem("What is <image>?")])


def test_an_end_token_that_a_tokenizer_takes_for_a_word_is_no_part_of_an_answer(world, tmp_path, monkeypatch):
    """With every token an end, nothing is left to grade: not in an evaluation, nor for a reward, nor in look.py."""
    student, texts = make_checkpoint(tmp_path / "student", eos_token_id=list(range(303))), []
    for module in map(importlib.import_module, ("common", "grpo", "look")):
        monkeypatch.setattr(module, "grade", lambda text, *_, name=module.__name__: texts.append((name, text)) or False)
    run("grpo", **arguments_of("grpo", world, student=student, steps=1), out_dir=tmp_path / "run")
    run("look", student=student, teacher=student, eval_data=world["eval_data"], eval_max_new_tokens=4)
    assert set(texts) == {("common", ""), ("grpo", ""), ("look", "")}


@pytest.mark.parametrize("recipe", [path.name for path in (ROOT / "recipes").glob("*.txt")])
def test_every_recipe_is_good_for_its_commands_asks_for_a_mark_and_says_whose_every_value_is(recipe):
    paper = dict(student="Qwen/Qwen3-0.6B-Base", top_p=0.95, top_k=20, lr=5e-7, batch_size=32, steps=1000)
    first, *lines = (ROOT / "recipes" / recipe).read_text(encoding="utf-8").splitlines()
    script = re.search(rf"python (\w+)\.py --recipe recipes/{recipe}", first)[1]
    for name in {*DISTILLATION} - {"curriculum"} if script == "opd" else [script]:
        args = parse(importlib.import_module(name).Args, ["--recipe", str(ROOT / "recipes" / recipe), "--seed", "7"])
        check_args(args)
        assert "\\boxed{}" in args.instruction and args.seed == 7
        assert getattr(args, "warmup_steps", 0) == getattr(args, "steps", 0) // 20
        if recipe.startswith("qwen3") and script in DISTILLATION:
            assert vars(args) == vars(args) | paper | {"max_new_tokens": 4096 if script == "curriculum" else 1024}
    values = [line for line in lines if line.startswith("--")]
    assert values and [line for line in values if not re.search(r"# \[(paper|follow-up|ours)\]", line)] == []


def test_the_command_line_wins_over_a_recipe_wherever_it_stands(tmp_path):
    first, second = (str(tmp_path / name) for name in ("first.txt", "second.txt"))
    put = lambda path, text: open(path, "w", encoding="utf-8").write(text)
    put(first, "# a comment\n--lr 5e-7  # another\n--out_dir 'a folder'\n\n--steps=7\n")
    put(second, "\ufeff--steps 8\n")
    for argv, steps in ((["--steps", "9", f"--recipe={first}"], 9), (["--recipe", first, "--recipe", second], 8)):
        args = parse(opd.Args, argv)
        assert (args.lr, args.steps, args.out_dir) == (5e-7, steps, "a folder")
    for content, says in (("--lr 'x", "cannot be read"), ("--recipe a", "by --recipe"), ("--rate 1", "unrecognized")):
        put(first, content)
        with pytest.raises(SystemExit, match=says):
            parse(opd.Args, ["--recipe", first])


def test_auto_is_measured_once_for_models_that_are_not_tiny_and_kept(world, tmp_path, monkeypatch, capsys):
    """... and reused where a run goes on. In bf16 updates of 5e-7 would be rounded away, so what is trained has fp32
    weights all the same; what samples and the teacher have not."""
    seconds, size, loaded = {torch.float32: 2e-3, torch.bfloat16: 1e-3}, [10_000_000], []
    recorded = lambda name: json.loads((tmp_path / name / "args.json").read_text(encoding="utf-8"))["precision"]
    timed = lambda code, globals, num_threads: SimpleNamespace(median=seconds[globals["a"].dtype])
    timer = lambda *args, **options: SimpleNamespace(timeit=lambda times: timed(*args, **options))
    monkeypatch.setattr(models, "Timer", timer)
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self, **_: size[0])
    monkeypatch.setattr(opd, "check_models", lambda *them: loaded.append([model.dtype for model in them]))
    more = world | dict(eval_data="none", out_dir=tmp_path / "run")
    run("opd", **more)
    assert models.load_model(world["student"], "auto").dtype == torch.bfloat16, "so do evaluate.py and look.py"
    said = capsys.readouterr().out
    assert said.count("--precision auto is bf16: a product takes 2.0 ms in fp32, 1.0 ms in bf16") == 2
    seconds[torch.bfloat16] = 3e-3
    run("opd", **more | dict(steps=4))
    assert "--precision auto" not in capsys.readouterr().out and recorded("run") == "bf16"
    assert loaded == [[torch.float32, torch.bfloat16, torch.bfloat16]] * 2
    seconds[torch.bfloat16], size[0] = 1e-3, 9_999_999
    run("opd", **more | dict(steps=1, out_dir=tmp_path / "tiny"))
    assert recorded("tiny") == "fp32" and loaded[2] == [torch.float32] * 3


@pytest.mark.parametrize("script", ["opd", "curriculum"])
def test_prompts_without_answers_are_enough_and_the_first_is_shown(script, world, tmp_path, curves, recwarn, capsys):
    """--eval_data none: a teacher needs no answers, so neither does a run. And checkpointing changes no number."""
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i} words."} for i in range(12)])
    for name in ("true", "false"):
        more = dict(data=data, eval_data="none", gradient_checkpointing=name, out_dir=tmp_path / name)
        run(script, **arguments_of(script, world, **more))
    begins = f"{data}: 12 problems (question=prompt). The first prompt:\n    <|im_start|>user\n    Say 0 words.<|"
    rows, files = read_log(tmp_path / "true"), {path.name for path in (tmp_path / "true").iterdir()}
    assert begins in capsys.readouterr().out and rows == read_log(tmp_path / "false")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1]["entropy"] > 0
    assert not any(key.startswith(("avg_at_k", "eval_")) for row in rows for key in row)
    assert files == {"args.json", "log.jsonl", "checkpoint-3", "model", "curves.png"}
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]


def test_a_real_model_with_what_is_made_for_the_toy_is_warned_of(world, monkeypatch, capsys):
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self: 11_000_000)
    given = {"data": world["data"], "eval_data": "none", "lr": 1e-5}
    for left_out in (None, *given):
        some = {name: value for name, value in given.items() if name != left_out}
        models.load_student(opd.Args(student=world["student"], precision="fp32", **some))
        assert re.findall(r"warning: --(\w+) \S+: made for the toy", capsys.readouterr().out) == [left_out] * bool(
            left_out
        )
