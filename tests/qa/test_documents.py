"""README and docs/ say what is so: commands that parse and run, links that resolve, numbers that results.json holds."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import compare
from plumbing.arguments import parse

TEXTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md", ROOT / "CONTRIBUTING.md"])


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(path):
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```", read(path), re.M | re.S) if not language]


def commands():
    """Every command line of the texts, without its comment."""
    for path in TEXTS:
        for line in "".join(blocks(path)).splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True) if re.match(r"\S*(python3?|torchrun) (?!-c )", part) else []
                if words:
                    yield pytest.param(words, id=f"{path.name}: {' '.join(words)}"[:90])


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_parses(words, capsys):
    """Each names a script or a module that is there, and arguments that it takes."""
    script, *argv = words[1:] if words[1] != "--nproc_per_node" else words[3:]
    if script == "-m":
        module = argv[0]
        assert module in ("venv", "pytest") or (ROOT / (module.replace(".", "/") + ".py")).exists()
        return
    assert (ROOT / script).exists()
    if "/" in script:
        return
    module = importlib.import_module(script.removesuffix(".py"))
    while script == "compare.py" and argv and not argv[0].startswith("-"):
        argv.pop(0)
    for word, value in zip(argv, argv[1:]):
        assert word != "--recipe" or (ROOT / value).exists()
    parse(module.Args, argv)


OF_SECONDS = [
    case
    for case in commands()
    if case.values[0][1] in ("evaluate.py", "look.py", "docs/endings.py")
    and not any("runs/" in word or word.startswith("recipes/") or word == "TEACHER" for word in case.values[0])
]


@pytest.mark.parametrize("words", OF_SECONDS)
def test_commands_of_seconds_run(words, monkeypatch, capsys):
    """... and an evaluation comes to what results.md says (to .01: single draws fall differently on other machines)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(words[1], run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    if words[1] == "evaluate.py":
        said = re.search(rf"^\| `{words[3]}` \| ([\d.]+) ", read(ROOT / "docs/results.md"), re.M)
        came = re.search(r"^\| toy/eval.jsonl \| 128 \| ([\d.]+) ", printed, re.M)
        assert float(came[1]) == pytest.approx(float(said[1]), abs=0.01)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_resolves(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(path)):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_every_test_and_every_line_of_code_that_the_lesson_names_is_there():
    text = read(ROOT / "docs/lesson.md")
    code = "".join(read(p) for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("plumbing/*.py")])
    names, lines = re.findall(r"`(test_\w+)`", text), re.findall(r"`(return [^`]+)`", text)
    assert len(names) > 3 and lines and not [line for line in lines if line not in code]
    assert [name for name in names if f"def {name}(" not in code] == []


def test_the_diff_in_readme_is_what_its_command_prints():
    block = next(block for block in blocks(ROOT / "README.md") if block.startswith("$ diff"))
    command, *lines = block.removeprefix("$ ").strip().splitlines()
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True).stdout
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in lines]


def test_the_numbers_are_those_of_results_json():
    """figures/ is made of its results.json; the findings stand in results.md as they are, and every number with an
    interval in the texts stands in a table of it."""
    committed = ROOT / "figures"
    worlds = json.loads(read(committed / "results.json"))
    assert compare.findings(worlds) == read(committed / "findings.md")
    assert compare.summary(next(iter(worlds.values()))) == read(committed / "table.md")
    assert read(committed / "findings.md") in read(ROOT / "docs/results.md")
    form = r"\d*\.\d+ ± \d*\.\d+"
    numbers = set(re.findall(form, read(committed / "table.md")))
    for path in TEXTS:
        if path.parent.name != "bench":
            assert [number for number in re.findall(form, read(path)) if number not in numbers] == [], path.name


def test_the_whole_idea_in_readme_runs_and_learns(monkeypatch, capsys):
    """For 30 steps, of which the last five have less loss than the first five."""
    code = re.search(r"^<!-- idea -->\n```python\n(.*?)^```", read(ROOT / "README.md"), re.M | re.S)[1]
    assert len(code.splitlines()) <= 25 and "range(100)" in code
    assert {*re.findall(r"^(?:import|from) (\w+)", code, re.M)} == {"torch", "transformers", "common"}
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    exec(code.replace("range(100)", "range(30)"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


NUMBER = re.compile(r"(?<![\w.])\d*\.\d+(?:e-?\d+)?(?![\w.]*\d)|(?<![\w.])\d+e-\d+")


def unfounded(text, sources, numbers=()):
    """The decimals of a text that are none of the numbers, and of those in the sources, rounded as the text has it."""
    text = re.sub(r"arXiv \S+|/abs/\S+|Qwen\S+|^\| .* \| \w+ \|$", "", text, flags=re.M)  # (findings are tested above)
    known = np.array([*numbers, *(float(x) for source in sources for x in NUMBER.findall(source))])
    form = lambda x: f".{len(x.partition('.')[2].partition('e')[0])}{'e' if 'e' in x else 'f'}"
    known_as = lambda x: {format(number, form(x)) for number in known}
    return [x for x in NUMBER.findall(text) if format(float(x), form(x)) not in known_as(x)]


def sections(name):
    return [part.partition("\n")[::2] for part in re.split(r"^## ", read(ROOT / "docs" / name), flags=re.M)[1:]]


def test_every_decimal_of_the_answers_was_printed_in_its_section_of_the_lesson_or_is_given_there():
    """... as docs/outputs.py has kept it, or by the first command, whose console README shows."""
    outputs, table = json.loads(read(ROOT / "docs/outputs.json")), read(ROOT / "figures/table.md")
    said = "\n".join(next(iter(outputs.values()))["python opd.py"][-8:-1])
    assert list(outputs) == [title for title, _ in sections("lesson.md")]
    for (title, asks), (_, answers) in zip(sections("lesson.md"), sections("answers.md"), strict=True):
        assert unfounded(answers, [asks, table, said, str(outputs[title])]) == [], title
    assert said in read(ROOT / "README.md") and unfounded("a wrong 0.12345", [said]) == ["0.12345"]


def test_every_decimal_of_readme_and_results_is_an_end_a_gate_or_a_setting():
    """... of a world in results.json, as a mean over seeds; or where its base student begins."""
    numbers = []
    for kinds in json.loads(read(ROOT / "figures/results.json")).values():
        numbers += [np.mean([run["solved"][0] for run in kinds[kind]]) for kind in ("opd", "base-opd")]
        for runs in kinds.values():
            numbers += [np.mean([run[key][-1] for run in runs]) for key in ("useful", "entropy")]
            gates = [[nats for _, nats, _ in run["gates"]] for run in runs]
            numbers += [*np.ravel(gates), *np.mean(gates, 0)]
    files = "curriculum.py", "toy/build.py", "figures/table.md"
    console = json.loads(read(ROOT / "docs/outputs.json"))
    sources = [read(ROOT / file) for file in files] + [str(console[part]) for part in list(console)[:1]]
    for name in ("README.md", "docs/results.md"):
        text = re.sub(r"^\| `toy/.*$", "", read(ROOT / name), flags=re.M)  # tests/qa/test_toy.py looks at these rows
        assert unfounded(text, sources, numbers) == [], name
    wrong = [x / 1000 for x in range(1000) if not unfounded(f"{x / 1000:.3f}", sources, numbers)]
    assert len(wrong) < 300, "the test can fail"
