"""Questions and answers: dataset formats, prompts and grading. No model is touched here."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction


def refuse(message):
    """End the program with one readable line on stderr and exit code 1 (SystemExit): bad input is not a bug."""
    raise SystemExit("error: " + " ".join(str(message).split()))


@dataclass
class Problem:
    """One row of a dataset. `prompt` holds the token ids that both models see, once encode_prompts has run."""

    question: str
    answer: str | None = None  # the reference, without "####" or "\boxed{}"; None where the file has none
    level: str | None = None  # difficulty, where the file has it
    prompt: tuple[int, ...] = ()


def load_problems(name, needs_answer=False):
    """Read a JSONL/JSON file, another file `datasets` knows, or `name[:config[:split]]` on the hub -> [Problem].

    A row needs `prompt`, `problem` or `question` (a string), and an `answer` (string or number; GSM8K's
    "... #### 42" and "\\boxed{}" are understood) if `needs_answer`. Refuses, naming the row, whatever is not so.
    """
    problems = []
    for i, row in enumerate(_rows(name), 1):
        question = next((row[key] for key in ("prompt", "problem", "question") if row.get(key) is not None), None)
        if not isinstance(question, str) or not question.strip():
            columns = ", ".join(row)
            refuse(f"{name}, row {i}: needs a text `prompt`, `problem` or `question`; its columns are: {columns}")
        answer = row.get("answer")
        if needs_answer and (answer is None or isinstance(answer, (dict, list)) or str(answer).strip() == ""):
            refuse(f"{name}, row {i}: evaluation needs an `answer`; its columns are: {', '.join(row)}")
        if answer is not None:
            answer = find_answer(str(answer)) or str(answer).strip()
        level = row.get("level")
        problems.append(Problem(question.strip(), answer, None if level is None else str(level)))
    if not problems:
        refuse(f"{name}: no rows in it")
    latex = next((p.answer for p in problems if needs_answer and _number(p.answer) is None), None)
    if latex is not None:
        _math_verify(f"{name} has the answer {latex!r}, which")
    return problems


def _rows(name):
    """The dataset's rows as dicts. `datasets` is imported only for what plain JSON cannot read: it takes seconds."""
    if name.endswith((".jsonl", ".json")) or os.path.exists(name):
        if not os.path.isfile(name):
            refuse(f"no data file {name!r} (looked in {os.getcwd()}); give a file, or name[:config[:split]] on the hub")
        if name.endswith((".jsonl", ".json")):
            return _json_rows(name)
        kind = {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(name.rsplit(".", 1)[-1])
        if kind is None:
            refuse(f"{name}: do not know this kind of file; give .jsonl, .json, .csv or .parquet")
        source, options = kind, {"data_files": name, "split": "train"}
    else:
        source, config, split = (name.split(":") + [None, None])[:3]
        options = {"name": config or None, "split": split or "train"}
    try:
        from datasets import load_dataset

        return load_dataset(source, **options)
    except Exception as error:  # every kind of trouble comes from there: network, name, split, parsing
        refuse(f"cannot load the dataset {name!r} ({type(error).__name__}: {error}); give a file or a hub name")


def _json_rows(name):
    try:
        with open(name, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot read {name}: {error}")
    if name.endswith(".json"):
        try:
            rows = json.loads(text)
        except ValueError as error:
            refuse(f"{name}: not JSON ({error})")
        if not isinstance(rows, list):
            refuse(f"{name}: needs a list of rows, found {type(rows).__name__}")
    else:
        rows = []
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    refuse(f"{name}, line {i}: not JSON ({error})")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            refuse(f"{name}, row {i}: needs an object with named columns, found {type(row).__name__}")
    return rows


def encode_prompts(problems, tokenizer, thinking=False, instruction=""):
    """Fill in each problem's `prompt`: its question as one user turn in the tokenizer's chat template -> None.

    `instruction` is appended to the question on a line of its own; `thinking` reaches templates that know it.
    """
    if not tokenizer.chat_template:
        refuse(f"the tokenizer in {tokenizer.name_or_path!r} has no chat template, so there is no way to ask it")
    for p in problems:
        content = p.question + ("\n" + instruction if instruction else "")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        p.prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# ----------------------------------------------------------------------------------------------------------------
# Grading


def grade(response, answer):
    """Is the last marked answer in `response` (text) equal to the reference `answer`? -> bool.

    Numbers are compared as numbers ("1,000" = "1000.0", "\\frac{1}{2}" = "0.5"); other answers by math-verify.
    """
    found = find_answer(response)
    if found is None:
        return False
    if _plain(found) == _plain(answer):
        return True
    number, reference = _number(found), _number(answer)
    if reference is not None:
        return number is not None and math.isclose(number, reference, rel_tol=1e-9, abs_tol=1e-9)
    parse, verify = _math_verify(f"the answer {answer!r}")
    return bool(verify(parse(f"\\boxed{{{answer}}}"), parse(f"\\boxed{{{found}}}")))


def find_answer(text):
    """The last marked answer in a text, `\\boxed{...}` with nested braces or `#### ...` to the end of the line.

    -> str, or None where nothing is marked. The last one counts: a model may correct itself.
    """
    spans = [(m.end(), m.group(1)) for m in re.finditer(r"####[ \t]*([^\s#][^\n#]*)", text)]
    for m in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, m.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        if depth == 0:  # an unclosed box was cut off, and is no answer
            spans.append((end, text[m.end() : end - 1]))
    return max(spans)[1].strip() or None if spans else None


def _plain(text):
    """Without the marks around a number that mean nothing: spaces, $, thousands separators, a final full stop."""
    text = text.strip().strip("$").strip().removesuffix(".")
    text = re.sub(r"\\text\{\s*(.*?)\s*\}$", r"\1", text).replace("\\$", "").replace("\\!", "").replace("\\,", "")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).strip().rstrip("%\\").strip("$ ")


def _number(text):
    """The number that a short answer is, or None: integers, decimals, a/b and \\frac{a}{b}."""
    text = re.sub(r"^(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", _plain(text))
    if re.fullmatch(r"[-+]?(\d+/\d+|\d+\.?\d*|\.\d+)", text.replace(" ", "")):
        try:
            return float(Fraction(text.replace(" ", "").replace("--", "")))
        except (ZeroDivisionError, OverflowError):
            return None
    return None


def _math_verify(who):
    try:
        from math_verify import parse, verify
    except ImportError:
        refuse(f"{who} is LaTeX, graded by math-verify: pip install 'math-verify[antlr4_13_2]'")
    return parse, verify
