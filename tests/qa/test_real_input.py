"""The same scripts on input as it comes: published data formats, other architectures, the conventions of Qwen3."""

import importlib
import itertools
import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import DISTILLATION, ROOT, arguments_of, make_checkpoint, make_tokenizer, read_log, run, write_jsonl

import opd
from plumbing import models, tasks
from plumbing.models import load_model, load_vocab
from plumbing.runs import check_args, parse

GSM8K = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 altogether.\n#### 72",
}
MATH = {"problem": "Find $3 \\cdot 4$.", "solution": "It is $\\boxed{12}$.", "answer": "12", "level": 2}
AMC = {"id": 0, "problem": "How many miles?", "answer": 27.0, "question": "How many miles?"}
AIME = {"id": 60, "problem": "Find the number of minutes.", "answer": "025", "url": "x"}


@pytest.mark.parametrize("row, answer", [(GSM8K, "72"), (MATH, "12"), (AMC, "27.0"), (AIME, "025")])
def test_published_formats(row, answer, tmp_path):
    (problem,) = tasks.load_problems(write_jsonl(tmp_path / "a.jsonl", [row]), needs_answer=True)
    assert problem.answer == answer and problem.question == (row.get("problem") or row["question"])
    assert tasks.grade(f"... so it is \\boxed{{{float(answer):g}}}.", problem.answer)


def test_hub_names_carry_config_and_split(monkeypatch):
    asked = []
    load = lambda path, name, split: asked.append((path, name, split)) or [GSM8K]  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", load)
    for name in ("openai/gsm8k:main:test", "openai/gsm8k:main", "zwhe99/DeepMath"):
        tasks.load_problems(name)
    gsm8k = "openai/gsm8k"
    assert asked == [(gsm8k, "main", "test"), (gsm8k, "main", "train"), ("zwhe99/DeepMath", None, "train")]


@pytest.mark.parametrize("script", ["opd", "sft_offpolicy"])
@pytest.mark.parametrize(
    "student, teacher",
    [
        (dict(arch="Llama", tied=False), dict(arch="Llama", tied=True, hidden=48)),
        (dict(arch="Qwen3", tied=True, padded=5), dict(arch="Llama", tied=False, padded=21)),
        (dict(arch="Llama", tied=True, padded=9), dict(arch="Qwen3", tied=False, padded=9)),
    ],
    ids=["llama", "qwen3-from-llama-padded", "llama-from-qwen3"],
)
def test_any_causal_lm_checkpoint(script, student, teacher, tmp_path, capsys):
    """Two architectures, tied and untied heads, a BPE tokenizer, different end tokens, padded vocabularies, and a
    generation_config that would cut the distribution if anybody looked at it."""
    corpus = [GSM8K["question"], GSM8K["answer"]]
    paths = {}
    for role, options, eos in (("student", student, "<|endoftext|>"), ("teacher", teacher, "<|im_end|>")):
        tokenizer = make_tokenizer(eos, corpus, vocab_size=340)
        paths[role] = make_checkpoint(tmp_path / role, tokenizer=tokenizer, **options)
        hostile = dict(do_sample=True, temperature=0.01, top_k=1, eos_token_id=tokenizer.eos_token_id)
        (tmp_path / role / "generation_config.json").write_text(json.dumps(hostile))
    train = write_jsonl(tmp_path / "train.jsonl", [GSM8K | {"question": f"{i}. {GSM8K['question']}"} for i in range(6)])
    evals = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((GSM8K, MATH, AMC))]
    arguments = dict(steps=2, batch_size=4, max_new_tokens=8, eval_max_new_tokens=8, eval_k=2, lr=1e-3)
    run(script, **paths, data=train, eval_data=",".join(evals), **arguments, out_dir=tmp_path / "run/out")
    rows = read_log(tmp_path / "run/out")
    assert len(rows) == 3 and 0 < rows[2]["eval_entropy"] < 6 and f"avg_at_k/{evals[2]}" in rows[2]
    said = capsys.readouterr().out
    assert ("cropped to the tokenizer's" in said) == (student.get("padded", 0) != teacher.get("padded", 0))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/out/model")
    assert saved.config.tie_word_embeddings == student["tied"]
    assert type(saved).__name__ == student["arch"] + "ForCausalLM"
    assert saved.config.vocab_size == 343 + student.get("padded", 0), "training does not resize a model"
    assert set(saved.generation_config.eos_token_id) == {340, 342}  # whoever samples from it stops as we did


def ask(student, teacher, *argv, question="Is 7 prime?"):
    """-> the prompt that a question becomes, as text; the vocabulary; the tokenizer."""
    problems = [tasks.Problem(question, "1")]
    args = parse(opd.Args, ["--student", str(student), "--teacher", str(teacher), *argv])
    vocab, tokenizer = load_vocab(args, [problems])
    return tokenizer.decode(problems[0].prompt), vocab, tokenizer


@pytest.fixture
def copied(world, tmp_path):
    """A copy of the student, to be changed."""
    return shutil.copytree(world["student"], tmp_path / "student")


def test_ends_are_those_of_config_generation_config_and_tokenizer(world, copied):
    """Qwen's chat models name <|im_end|> in one of them and <|endoftext|> in another."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    _, vocab, tokenizer = ask(copied, world["teacher"])
    assert {5, 6, 7, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>"])} <= set(vocab.end_ids)


def test_a_template_that_tells_the_date_tells_the_same_one_on_every_day(copied):
    """Llama 3's does: a run that goes on after midnight would go on with other prompts."""
    (copied / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert ask(copied, copied)[0] == "26 Jul 2024: Is 7 prime?"


def test_a_token_that_no_text_holds_may_lie_beyond_the_vocabulary(copied, tmp_path):
    """Gemma 3's tokenizer has one for images, and its small models no row for it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(copied)
    assert ask(copied, copied)[1].size == 303 == len(tokenizer) - 1
    larger = make_checkpoint(tmp_path / "larger", padded=5)
    assert ask(copied, larger)[1].size == 303, "cropped to what both models have"
    with pytest.raises(SystemExit, match="ids up to 303"):
        ask(copied, copied, question="What is <image>?")


def test_an_end_token_that_a_tokenizer_takes_for_a_word_is_no_part_of_an_answer(world, tmp_path, monkeypatch):
    """With every token an end, nothing is left to grade: not in an evaluation, nor for a reward, nor in look.py."""
    student, texts = make_checkpoint(tmp_path / "student", eos_token_id=list(range(303))), []
    for module in map(importlib.import_module, ("common", "grpo", "look")):
        monkeypatch.setattr(module, "grade", lambda text, *_, name=module.__name__: texts.append((name, text)) or False)
    run("grpo", **arguments_of("grpo", world, student=student, steps=1), out_dir=tmp_path / "run")
    run("look", student=student, teacher=student, eval_data=world["eval_data"], eval_max_new_tokens=4)
    assert set(texts) == {("common", ""), ("grpo", ""), ("look", "")}


@pytest.mark.parametrize("answer, read", [(5e-5, "0.00005"), (1e16, "10000000000000000"), (float("nan"), None)])
def test_numbers_are_written_out_and_nan_is_no_answer(answer, read, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GSM8K | {"answer": answer}])
    assert tasks.load_problems(path)[0].answer == read
    if read is None:
        with pytest.raises(SystemExit, match="needs an `answer`"):
            tasks.load_problems(path, needs_answer=True)


@pytest.mark.parametrize(
    "argv, asks, begins",
    [
        ([], "Is 7 prime?", "<think>\n\n</think>\n\n"),  # thinking off unless asked for
        (["--thinking", "true"], "Is 7 prime?", ""),
        (["--instruction", "Box it."], "Is 7 prime?\nBox it.", "<think>\n\n</think>\n\n"),
    ],
)
def test_the_prompt_is_the_teachers_template_with_what_was_asked_for(argv, asks, begins, world):
    text, *_ = ask(world["student"], world["teacher"], *argv)
    assert text == f"<|im_start|>user\n{asks}<|im_end|>\n<|im_start|>assistant\n{begins}"


# ----------------------------------------------------------------------------------------------------------------
# Recipes, precision, memory

PAPER = dict(  # what public notes quote of the paper, and its authors' follow-up
    student="Qwen/Qwen3-0.6B-Base", data="agentica-org/DeepScaleR-Preview-Dataset", precision="bf16", thinking=False,
    temperature=1.0, top_p=0.95, top_k=20, lr=5e-7, warmup=0.05, batch_size=32, steps=1000, max_new_tokens=1024,
    eval_temperature=0.6, instruction="Please reason step by step, and put your final answer within \\boxed{}.",
)  # fmt: skip
RECIPES = {path.name: path.read_text() for path in sorted((ROOT / "recipes").glob("*.txt"))}


def parsed(script, recipe, *more):
    return parse(importlib.import_module(script).Args, ["--recipe", str(ROOT / "recipes" / recipe), *more])


@pytest.mark.parametrize("script", [script for script in DISTILLATION if script != "curriculum"])
@pytest.mark.parametrize("teacher", ["4B", "8B"])
def test_one_flag_brings_the_papers_setting(script, teacher):
    args = parsed(script, f"qwen3-{teacher.lower()}.txt", "--seed", "7")
    assert vars(args) == vars(args) | PAPER | {"teacher": f"Qwen/Qwen3-{teacher}", "seed": 7}
    assert getattr(args, "lam", 0.2) == 0.2
    names = [name.split(":")[0].split("/")[1] for name in args.eval_data.split(",")]
    assert names == ["aime_2024", "amc23", "MATH-500", "gsm8k"]


def test_curriculum_rl_and_final_evaluation_have_recipes_of_their_own():
    args = parsed("curriculum", "qwen3-curriculum.txt")
    assert vars(args) == vars(args) | PAPER | {"max_new_tokens": 4096}
    assert args.lengths.startswith("128,") and args.lengths.endswith(",4096")
    args = parsed("grpo", "qwen3-grpo.txt")
    plain = dict(student="runs/qwen3-opd/model", lr=1e-6, max_new_tokens=4096, temperature=1.0, top_p=1.0, top_k=0)
    assert vars(args) == vars(args) | PAPER | plain and args.group_size == 8
    args = parsed("evaluate", "qwen3-eval.txt")
    assert (args.eval_max_new_tokens, args.eval_problems, args.instruction) == (8192, 0, PAPER["instruction"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_good_for_its_command_asks_for_a_mark_and_says_whose_every_value_is(recipe):
    first, *lines = RECIPES[recipe].splitlines()
    args = parsed(re.search(rf"python (\w+)\.py --recipe recipes/{recipe}", first)[1], recipe)
    check_args(args)
    assert "\\boxed{}" in args.instruction
    values = [line for line in lines if line.startswith("--")]
    assert [line for line in values if not re.search(r"# \[(paper|follow-up|ours)\]", line)] == []


def test_the_command_line_wins_over_a_recipe_wherever_it_stands(tmp_path):
    recipe = tmp_path / "mine.txt"
    recipe.write_text("# a comment\n--lr 5e-7  # another\n--out_dir 'a folder'\n\n--steps=7\n")
    for argv in (["--recipe", str(recipe), "--steps", "9"], ["--steps", "9", f"--recipe={recipe}"]):
        args = parse(opd.Args, argv)
        assert (args.lr, args.steps, args.out_dir) == (5e-7, 9, "a folder")
    (tmp_path / "second.txt").write_text("\ufeff--steps 8\n")
    args = parse(opd.Args, ["--recipe", str(recipe), "--recipe", str(tmp_path / "second.txt")])
    assert (args.lr, args.steps) == (5e-7, 8)
    for content, says in (("--lr 'x", "cannot be read"), ("--recipe a", "by --recipe"), ("--rate 1", "unrecognized")):
        recipe.write_text(content)
        with pytest.raises(SystemExit, match=says):
            parse(opd.Args, ["--recipe", str(recipe)])
    with pytest.raises(SystemExit, match="cannot be read"):
        parse(opd.Args, ["--recipe", "nowhere.txt"])


@pytest.mark.parametrize("gpu, able, real", list(itertools.product([True, False], repeat=3)))
def test_auto_is_bf16_on_gpus_and_for_real_models_on_processors_made_for_it(gpu, able, real, world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    assert models.is_toy(transformers.AutoConfig.from_pretrained(world["student"]))
    assert not models.is_toy(transformers.Qwen3Config())
    monkeypatch.setattr(models, "is_toy", lambda config: not real)
    assert models.resolve_precision(opd.Args(**world)) == ("bf16" if able and (gpu or real) else "fp32")
    assert models.resolve_precision(opd.Args(**world | dict(precision="fp32"))) == "fp32"


@pytest.mark.parametrize("script", ["opd", "curriculum"])
def test_prompts_without_answers_are_enough(script, world, tmp_path, curves):
    """--eval_data none: a teacher needs no answers, so neither does a run."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i} words."} for i in range(12)])
    run(script, **arguments_of(script, world, data=prompts, eval_data="none"), out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert not any(key.startswith(("avg_at_k", "eval_")) for row in rows for key in row) and rows[-1]["entropy"] > 0
    assert (tmp_path / "run/model").exists() and (tmp_path / "run/curves.png").stat().st_size > 1000
    assert not list(tmp_path.glob("run/responses-*"))


def test_a_config_of_which_no_model_can_be_made_is_left_to_the_checks_that_explain_it(world, monkeypatch):
    """On processors made for bf16 --precision auto counts parameters, and did so before anything had been checked."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    config = transformers.AutoConfig.from_pretrained(world["student"], vocab_size=290, pad_token_id=300)
    monkeypatch.setattr(models, "_load_config", lambda path, role: config)
    assert models.resolve_precision(opd.Args(**world)) == "fp32"


def test_a_trained_model_has_fp32_weights_at_any_precision(world):
    """At a learning rate of 5e-7 an update of a bf16 weight would be rounded away."""
    student = load_model(world["student"], opd.Args(precision="bf16"), trainable=True)
    assert {p.dtype for p in student.parameters()} == {torch.float32} and student.autocasts


def test_checkpointing_and_the_teachers_device_change_no_number(world, tmp_path):
    """And the record holds the precision that "auto" stood for."""
    run("opd", **world, out_dir=tmp_path / "plain")
    run("opd", **world, gradient_checkpointing=True, teacher_device="cpu", out_dir=tmp_path / "checkpointed")
    assert read_log(tmp_path / "plain") == read_log(tmp_path / "checkpointed")
    assert json.loads((tmp_path / "plain/args.json").read_text())["precision"] in ("fp32", "bf16")


def test_rl_leaves_out_problems_without_an_answer(tmp_path, capsys):
    rows = [GSM8K, *(GSM8K | {"answer": answer} for answer in ("", None, 0))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [p.answer for p in tasks.load_problems(path, True, skip_unanswered=True)] == ["72", "0"]
    assert "left out 2 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="row 2"):
        tasks.load_problems(path, True)
