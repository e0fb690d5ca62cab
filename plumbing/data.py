"""Problems and the prompts that they become: dataset formats, columns, chat templates. No model is touched here."""

import gzip
import importlib.util
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from plumbing.arguments import refuse
from plumbing.grading import can_be_graded, clean_reference, needs_math_verify
from plumbing.processes import say


@dataclass
class Problem:
    """One row of a dataset. `prompt` and `response_ids` hold token ids once they have been encoded."""

    question: str  # the user's last turn
    answer: str | None = None  # the reference, without "####" or "\boxed{}"; None where the file has none
    level: str | None = None  # difficulty, where the file has it
    response: str | None = None  # a teacher's response, as text
    response_ids: list | None = None  # ... as token ids, which count if both are there
    ended: bool = True  # whether that response finishes
    before: list | tuple = ()  # turns before the question: a system turn, earlier questions and answers
    prompt: tuple[int, ...] = ()


COLUMNS = {  # what may stand in which column; a.b is b in a column of dicts; the first one that is not empty is used
    "question": ("messages", "prompt", "problem", "question", "conversations"), "response": ("response", "completion"),
    "answer": ("answer", "final_answer", "solution", "reward_model.ground_truth"),
}  # fmt: skip


def load_problems(name, needs="", columns="", remedy=""):
    """Read a dataset: a file, folder or glob that `datasets` knows, or `name[:config[:split]]` on the hub.
    -> [Problem], which column is what, and the settings that evaluate.py has written into the first row

    needs: "answer", "response" or "text" (a response that may be empty): what every row should have. Rows without it,
    and those that no prompt can be made of, are left out and counted. columns: "question=NAME,answer=NAME,
    response=NAME", or some of them, where guessing fails; those that this file does not have are not looked at (see
    check_columns). remedy: what else to do where no rows are left."""
    rows = _rows(name)
    chosen, problems, left_out = _columns(name, rows, columns), [], Counter()
    for row in rows:
        try:
            problems.append(_problem(row, chosen, needs))
        except ValueError as why:
            left_out[str(why)] += 1
    counts = ", ".join(f"{n} rows {why}" for why, n in left_out.items())
    if not problems:
        make = f"python evaluate.py --model TEACHER --eval_data {name} --eval_k 1 --out_file FILE"
        remedy += f", or sample them by `{make}`" if needs == "response" else ""
        what = "response" if needs == "text" else needs
        named = f": name it by --columns {what}=NAME" if needs and rows else ""
        refuse(f"{name}: no rows left in it ({counts or 'it is empty'}){named}{remedy}")
    if counts:
        say(f"{name}: left out {counts}")
    latex = next((p.answer for p in problems if needs == "answer" and needs_math_verify(p.answer)), None)
    if latex is not None and importlib.util.find_spec("math_verify") is None:
        refuse(f"{name} has the answer {latex!r}, graded by math-verify: pip install math-verify")
    settings = rows[0].get("settings")
    return problems, chosen, settings if isinstance(settings, dict) else {}


def _problem(row, chosen, needs):
    """A row as a Problem. ValueError says why it is left out."""
    question, given, answer = (_cell(row, chosen[what]) for what in COLUMNS)
    if isinstance(question, str) and re.match(r"\[\s*\{.{0,3}(role|from)\b.*(content|value)\b", question, re.S):
        raise ValueError("with a conversation written as one text (keep it in JSON)")
    turns, response, ids = _turns(question), None, row.get("response_ids") or None
    if turns and turns[-1]["role"] == "assistant":
        response = turns.pop()["content"]
    if given is not None:
        response = "".join(turn["content"] for turn in _turns(given))
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("without a question of the user's")
    if isinstance(answer, (list, dict)):
        raise ValueError("whose answer is no text or number")
    if not isinstance(ids, (list, type(None))):
        raise ValueError("whose response_ids are no list")
    answer, level = clean_reference(answer), row.get("level")
    if needs == "answer" and (answer is None or not can_be_graded(answer)):
        raise ValueError("without an answer that can be graded")
    if needs == "response" and not (ids or response):
        raise ValueError("without a response")
    if needs == "text" and response is None:
        raise ValueError("without a response as text")
    level, ended = None if level is None else str(level), row.get("ended") is not False
    return Problem(turns[-1]["content"].strip(), answer, level, response, ids, ended, turns[:-1])


def _cell(row, column):
    """What stands in a column; of `a.b`, what stands under b in the dict of column a."""
    for key in [column] if column in row else (column or "").split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _turns(value):
    """A text, which is the user's, or a conversation, a list of {"role", "content"}. -> the turns that say something"""
    turns = value if isinstance(value, list) else [] if value is None else [{"role": "user", "content": str(value)}]
    sound = lambda turn: isinstance(turn, dict) and {type(turn.get("role")), type(turn.get("content"))} == {str}
    if isinstance(value, dict) or not all(map(sound, turns)):
        raise ValueError("that are neither texts nor lists of turns with a `role` and a text as `content`")
    return [{"role": t["role"], "content": t["content"]} for t in turns if t["content"].strip()]


def _columns(name, rows, columns):
    """Which column is what, one choice for the whole file. -> {"question": NAME, "answer": NAME, "response": NAME}, or
    None where there is none"""
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            refuse(f'{name}, row {i}: needs columns, as in {{"question": "..."}}, and is a {type(row).__name__}')
    there = list(dict.fromkeys(key for row in rows for key in row))
    filled = lambda column: any(_cell(row, column) not in (None, "", []) for row in rows)
    chosen = {what: next(filter(filled, names), None) for what, names in COLUMNS.items()}
    chosen |= {what: column for what, column in _given(columns) if what in COLUMNS and filled(column)}
    if rows and not chosen["question"]:
        names = ", ".join(COLUMNS["question"])
        names = f"{names}, or be named by --columns question=NAME"
        refuse(f"{name}: the question must stand in one of the columns {names}; it has: {', '.join(there)}")
    return chosen


def _given(columns):
    """--columns as [(what, column)]"""
    return [part.strip().partition("=")[::2] for part in columns.split(",") if part]


def check_columns(columns, chosen):
    """Refuse a column of --columns that none of the files has, of which `chosen` are the columns."""
    for what, column in _given(columns):
        if what not in COLUMNS or column not in [names[what] for names in chosen]:
            have = " or ".join({", ".join(f"{key}={name}" for key, name in names.items() if name) for names in chosen})
            refuse(f"--columns {what}={column}: no file has it; give {'/'.join(COLUMNS)}=COLUMN, such as {have}")


def load_problem_sets(names, n, columns="", needs="answer", chosen=(), remedy=""):
    """{name: [Problem]} of all sets in `names`, separated by commas; of each, n problems, evenly spread (0: all).
    chosen: the columns of other files, which --columns may be about."""
    found = {name: load_problems(name, needs, columns, remedy) for name in map(str.strip, names.split(","))}
    check_columns(columns, [*chosen, *(names for _, names, _ in found.values())])
    sets = {name: problems for name, (problems, *_) in found.items()}
    for name, problems in sets.items():
        if sentences := sum(p.answer is not None and not can_be_graded(p.answer) for p in problems):
            say(f"{name}: {sentences} answers are sentences, which no other wording equals")
        if 0 < (missing := sum(p.answer is None for p in problems)) < len(problems):
            say(f"{name}: {missing} rows have no answer, and are not graded")
        if 0 < n < len(problems):
            sets[name] = [problems[i * len(problems) // n] for i in range(n)]
    return sets


KINDS = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "json": "json", "jsonl": "json", "ndjson": "json"}


def _rows(name):
    """The dataset's rows. A plain file of JSON is read here, as `datasets` takes seconds to import, and refuses columns
    of numbers and texts."""
    path = Path(name)
    try:
        if re.search(r"\.(json|jsonl|ndjson)(\.gz)?$", name, re.I) and "*" not in name:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
                text, rows, end = file.read().rstrip(), [], 0
            while end < len(text):  # a row a line, or all in one value, whatever the file's name
                row, end = json.JSONDecoder().raw_decode(text, re.compile(r"\s*").match(text, end).end())
                rows.append(row)
            whole = rows[0] if len(rows) == 1 else rows
            whole = whole["data"] if isinstance(whole, dict) and isinstance(whole.get("data"), list) else whole
            return whole if isinstance(whole, list) else [whole]
        from datasets import disable_progress_bars, load_dataset, load_from_disk

        kind = KINDS.get(re.sub(r"\.(gz|bz2|xz|zst)$", "", name.lower()).rpartition(".")[2])
        if path.is_file() and not kind:
            raise ValueError(f"files of kind {path.suffix!r} are not read")
        if kind:  # one file, or many by a pattern
            disable_progress_bars()
            options = dict(keep_default_na=False, sep="\t" if ".tsv" in name.lower() else ",") if kind == "csv" else {}
            return list(load_dataset(kind, data_files=name, split="train", **options))
        source, config, split = (name.split(":", 2) + ["", ""])[:3]
        if os.path.isdir(source) and {"state.json", "dataset_dict.json"} & {*os.listdir(source)}:
            saved = load_from_disk(source)
            if config or split and not isinstance(saved, dict):
                raise ValueError("a saved folder has no CONFIG; name a split as FOLDER::SPLIT, if it has splits")
            return list(saved[split or "train"] if isinstance(saved, dict) else saved)
        return list(load_dataset(source, name=config or None, split=split or "train"))
    except Exception as error:  # every kind of trouble comes from there: files, formats, the network, names
        reason = f"{type(error).__name__}: {error}"[:300]
        formats = "a sound .jsonl, .json, .csv, .tsv or .parquet file, a folder, or name[:config[:split]] on the hub"
        refuse(f"cannot load {name!r}; give {formats} ({reason})")


_DATE = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro -%}"  # as Llama 3 has it where there is no clock


def encode_prompts(problems, tokenizer, thinking=False, instruction=""):
    """Fill in each problem's `prompt`: its turns in the tokenizer's chat template -> None.

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
        for i in range(0, len(problems), 1024):  # at a time: all at once is a third slower
            texts = []
            for p in problems[i : i + 1024]:
                turn = {"role": "user", "content": p.question + ("\n" + instruction if instruction else "")}
                texts.append(tokenizer.apply_chat_template([*p.before, turn], **options))
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for p, ids in zip(problems[i : i + 1024], encoded):
                p.prompt = tuple(ids)
    except Exception as error:  # a template is a program, and a text may hold what cannot be encoded
        refuse(f"{tokenizer.name_or_path!r}: its chat template fails on the question {p.question[:60]!r}: {error}")


def encode_responses(problems, tokenizer, end_id, vocab_size):
    """Fill in each problem's `response_ids`: of a text, its tokens, and the teacher's end token if it finishes."""
    texts = [p for p in problems if p.response_ids is None and p.response]
    encoded = tokenizer([p.response for p in texts], add_special_tokens=False)["input_ids"] if texts else []
    for p, ids in zip(texts, encoded):
        p.response_ids = ids + [end_id] if p.ended else ids
    for p in problems:
        if p.response_ids and not all(isinstance(i, int) and 0 <= i < vocab_size for i in p.response_ids):
            refuse(f"`response_ids` of {p.question[:60]!r} are no ids below {vocab_size}: another tokenizer's?")
