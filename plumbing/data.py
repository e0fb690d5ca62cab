"""Problems and the prompts that they become: dataset formats, columns, chat templates. No model is touched here."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from plumbing.arguments import refuse
from plumbing.grading import clean_reference, needs_math_verify


@dataclass
class Problem:
    """One row of a dataset. `prompt` and `response_ids` hold token ids once they have been encoded."""

    question: str
    answer: str | None = None  # the reference, without "####" or "\boxed{}"; None where the file has none
    level: str | None = None  # difficulty, where the file has it
    response: str | None = None  # a teacher's response, as text
    response_ids: list | None = None  # ... as token ids, which count if both are there
    ended: bool = True  # whether that response finishes
    prompt: tuple[int, ...] = ()


COLUMNS = {  # what may stand in which column; the first name that the file has is used
    "question": ("prompt", "problem", "question"), "answer": ("answer",), "response": ("response", "completion"),
}  # fmt: skip


def load_problems(name, needs="", columns=""):
    """Read a JSONL or JSON file, another file that `datasets` knows, or `name[:config[:split]]` on the hub.
    -> [Problem], the name of the question's column, and the settings that evaluate.py has written into the first row

    needs: "answer" or "response": what every row should have. Rows without it are left out and counted; a file without
    it is refused. columns: "question=NAME,answer=NAME,response=NAME", or some of them, where guessing fails."""
    rows = _rows(name)
    chosen = _columns(name, rows, columns)
    problems, left_out = [], 0
    for i, row in enumerate(rows, 1):
        question, answer, response = (row.get(chosen[what]) for what in COLUMNS)
        level, ids = row.get("level"), row.get("response_ids") or None
        for what, value, kinds in (
            (chosen["question"], question, str), (chosen["answer"], answer, (str, int, float, type(None))),
            (chosen["response"], response, (str, type(None))), ("response_ids", ids, (list, type(None))),
        ):  # fmt: skip
            if not isinstance(value, kinds) or what == chosen["question"] and not value.strip():
                there = f"is {json.dumps(value, default=str)[:60]}; its columns are: {', '.join(row)}"
                refuse(
                    f"{name}, row {i}: `{what}` must be a {'list' if what == 'response_ids' else 'text'}, and {there}"
                )
        problem = Problem(
            question.strip(), clean_reference(answer), None if level is None else str(level), response, ids
        )
        problem.ended = row.get("ended") is not False
        if needs == "answer" and problem.answer is None or needs == "response" and not (ids or response):
            left_out += 1
        else:
            problems.append(problem)
    if not problems:
        how = f"python evaluate.py --model TEACHER --eval_data {name} --eval_k 1 --out_file FILE"
        how = f": sample them by `{how}`, and train on --data FILE" if needs == "response" else ""
        refuse(f"{name}: no rows {f'with {needs}s ' * bool(left_out)}in it{how}")
    if left_out:
        print(f"{name}: left out {left_out} rows without {needs}")
    latex = next((p.answer for p in problems if needs == "answer" and needs_math_verify(p.answer)), None)
    if latex is not None and importlib.util.find_spec("math_verify") is None:
        refuse(f"{name} has the answer {latex!r}, graded by math-verify: pip install math-verify")
    return problems, chosen["question"], rows[0].get("settings") or {}


def _columns(name, rows, columns):
    """Which column is what: one choice for the whole file. -> {"question": NAME, "answer": NAME, "response": NAME}"""
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            refuse(f"{name}, row {i}: needs an object with named columns, found {type(row).__name__}")
    there = list(dict.fromkeys(key for row in rows for key in row))
    given = dict(part.partition("=")[::2] for part in columns.split(",") if part)
    if any(what not in COLUMNS or column not in there for what, column in given.items()):
        refuse(f"--columns {columns!r}: give {'/'.join(COLUMNS)}=COLUMN; {name} has the columns {', '.join(there)}")
    chosen = {what: next((n for n in names if n in there), names[0]) for what, names in COLUMNS.items()} | given
    if rows and chosen["question"] not in there:
        refuse(f"{name}: needs a column `prompt`, `problem` or `question`; its columns are: {', '.join(there)}")
    return chosen


def load_problem_sets(names, n, columns="", needs="answer"):
    """{name: [Problem]} of all sets in `names`, separated by commas; of each, n problems, evenly spread (0: all)."""
    sets = {name: load_problems(name, needs, columns)[0] for name in map(str.strip, names.split(","))}
    return {
        name: [problems[i * len(problems) // n] for i in range(n)] if 0 < n < len(problems) else problems
        for name, problems in sets.items()
    }


def _rows(name):
    """The dataset's rows. `datasets` is imported only for what plain JSON cannot read: it takes seconds."""
    kind, where = Path(name).suffix, name
    try:
        if kind in (".jsonl", ".json"):
            text = Path(name).read_text(encoding="utf-8-sig")
            if kind == ".json" and text.lstrip().startswith("["):
                return json.loads(text)
            rows = []
            for i, line in enumerate(text.split("\n"), 1):
                where = f"{name}, line {i}"
                if line.strip():
                    rows.append(json.loads(line))
            return rows
        from datasets import load_dataset

        if kind in (".csv", ".parquet"):
            return list(load_dataset(kind[1:], data_files=name, split="train"))
        source, config, split = (name.split(":", 2) + [None, None])[:3]
        return list(load_dataset(source, name=config or None, split=split or "train"))
    except Exception as error:  # every kind of trouble comes from there: files, formats, the network, names
        reason = f"{type(error).__name__}: {error}"[:300]
        formats = "a sound .jsonl, .json, .csv or .parquet file, or name[:config[:split]] on the hub"
        refuse(f"cannot load {where!r}; give {formats} ({reason})")


_DATE = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro -%}"  # as Llama 3 has it where there is no clock


def encode_prompts(problems, tokenizer, thinking=False, instruction=""):
    """Fill in each problem's `prompt`: its question as one user turn in the tokenizer's chat template -> None.

    `instruction` is appended to the question on a line of its own; `thinking` reaches templates that know it."""
    if not tokenizer.chat_template:
        refuse(
            f"the tokenizer in {tokenizer.name_or_path!r} has no chat template, so there is no way to ask it: take the "
            "chat version of this model, or put a chat_template.jinja next to its tokenizer"
        )
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=thinking, thinking=thinking)
    if "strftime_now" in tokenizer.chat_template:  # it tells the date, and a run may take more than a day
        options["chat_template"] = _DATE + tokenizer.chat_template
    try:
        texts = []
        for p in problems:
            content = p.question + ("\n" + instruction if instruction else "")
            texts.append(tokenizer.apply_chat_template([{"role": "user", "content": content}], **options))
        for p, ids in zip(problems, tokenizer(texts, add_special_tokens=False)["input_ids"]):
            p.prompt = tuple(ids)
    except Exception as error:  # a template is a program, and a text may hold what cannot be encoded
        refuse(f"{tokenizer.name_or_path!r}: its chat template fails on the question {p.question[:60]!r}: {error}")


def encode_responses(problems, tokenizer, end_id, vocab_size):
    """Fill in each problem's `response_ids`: of a text, its tokens, and the teacher's end token if it finishes."""
    for p in problems:
        if p.response_ids is None and p.response is not None:
            ids = tokenizer(p.response, add_special_tokens=False)["input_ids"]
            p.response_ids = ids + [end_id] if p.ended else ids
        elif p.response_ids and not all(isinstance(i, int) and 0 <= i < vocab_size for i in p.response_ids):
            refuse(f"`response_ids` of {p.question[:60]!r} are no ids below {vocab_size}: another tokenizer's?")
