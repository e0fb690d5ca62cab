"""Questions and answers: dataset formats, prompts and grading. No model is touched here."""

import json
import logging
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path


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


def load_problems(name, needs_answer=False, skip_unanswered=False):
    """Read a JSONL/JSON file, another file `datasets` knows, or `name[:config[:split]]` on the hub -> [Problem].

    A row needs `prompt`, `problem` or `question` (a string), and an `answer` (string or number; GSM8K's
    "... #### 42" and "\\boxed{}" are understood) if `needs_answer`. Refuses, naming the row, whatever is not so; but
    `skip_unanswered` leaves out rows with an empty answer, of which large training sets have a few, and counts them.
    """
    problems, skipped = [], 0
    for i, row in enumerate(_rows(name), 1):
        if not isinstance(row, dict):
            refuse(f"{name}, row {i}: needs an object with named columns, found {type(row).__name__}")
        column = next((key for key in ("prompt", "problem", "question") if row.get(key) is not None), None)
        if column is None:
            refuse(f"{name}, row {i}: needs a `prompt`, `problem` or `question`; its columns are: {', '.join(row)}")
        question = row[column]
        if not isinstance(question, str) or not question.strip():
            refuse(f"{name}, row {i}: `{column}` must be a text, and is {json.dumps(question, default=str)[:60]}")
        answer = row.get("answer")
        if isinstance(answer, float):  # 5e-05 is written out; and pandas writes NaN where there is none
            answer = None if math.isnan(answer) else format(Decimal(repr(answer)), "f")
        if skip_unanswered and "answer" in row and str(answer or "").strip() == "" and answer != 0:
            skipped += 1
            continue
        if needs_answer and (answer is None or isinstance(answer, (dict, list)) or str(answer).strip() == ""):
            found = f"is {json.dumps(answer)[:60]}" if "answer" in row else f"its columns are: {', '.join(row)}"
            refuse(f"{name}, row {i}: needs an `answer` to grade by, a text or a number; {found}")
        if answer is not None:
            answer = find_answer(str(answer)) or str(answer).strip()
        level = row.get("level")
        problems.append(Problem(question.strip(), answer, None if level is None else str(level)))
    if not problems:
        refuse(f"{name}: no rows in it" + (f" but {skipped} without an answer" if skipped else ""))
    if skipped:
        print(f"{name}: left out {skipped} rows without an answer")
    plain = [_plain(p.answer) for p in problems if needs_answer]
    latex = next((answer for answer in plain if _number(answer) is None and _word(answer) is None), None)
    if latex is not None:
        _math_verify(f"{name} has the answer {latex!r}, which")
    return problems


def load_evals(names, n):
    """{name: [Problem]} of all sets in `names`, separated by commas; of each, n problems, evenly spread (0: all)."""
    evals = {name: load_problems(name, needs_answer=True) for name in names.split(",")}
    return {
        name: [problems[i * len(problems) // n] for i in range(n)] if 0 < n < len(problems) else problems
        for name, problems in evals.items()
    }


def _rows(name):
    """The dataset's rows. `datasets` is imported only for what plain JSON cannot read: it takes seconds."""
    kind, where = Path(name).suffix, name
    try:
        if kind in (".jsonl", ".json"):
            text = Path(name).read_text(encoding="utf-8-sig")
        if kind == ".json":
            return list(json.loads(text))
        if kind == ".jsonl":
            rows = []
            for i, line in enumerate(text.split("\n"), 1):
                where = f"{name}, line {i}"
                if line.strip():
                    rows.append(json.loads(line))
            return rows
        from datasets import load_dataset

        if kind in (".csv", ".parquet"):
            return load_dataset(kind[1:], data_files=name, split="train")
        source, config, split = (name.split(":", 2) + [None, None])[:3]
        return load_dataset(source, name=config or None, split=split or "train")
    except Exception as error:  # every kind of trouble comes from there: files, formats, the network, names
        reason = f"{type(error).__name__}: {error}"[:300]
        refuse(
            f"cannot load {where!r}; give a sound .jsonl, .json, .csv or .parquet file, or name[:config[:split]] on "
            f"the hub ({reason})"
        )


_DATE = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro -%}"  # as Llama 3 has it where there is no clock


def encode_prompts(problems, tokenizer, thinking=False, instruction=""):
    """Fill in each problem's `prompt`: its question as one user turn in the tokenizer's chat template -> None.

    `instruction` is appended to the question on a line of its own; `thinking` reaches templates that know it.
    """
    if not tokenizer.chat_template:
        refuse(
            f"the tokenizer in {tokenizer.name_or_path!r} has no chat template, so there is no way to ask it: take the "
            "chat version of this model, or put a chat_template.jinja next to its tokenizer"
        )
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    if "strftime_now" in tokenizer.chat_template:  # it tells the date, and a run may take more than a day
        options["chat_template"] = _DATE + tokenizer.chat_template
    for p in problems:
        content = p.question + ("\n" + instruction if instruction else "")
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)
            p.prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # a template is a program, and a text may hold what cannot be encoded
            refuse(f"{tokenizer.name_or_path!r}: its chat template fails on the question {content[:60]!r}: {error}")


# ----------------------------------------------------------------------------------------------------------------
# Grading


def text_of(ids, tokenizer, vocab):
    """A response's token ids as text to grade: without end tokens, which not every tokenizer takes for special ones."""
    return tokenizer.decode([i for i in ids if i not in vocab.end_ids], skip_special_tokens=True)


def grade(response, answer, grading="marked"):
    """Is the last marked answer in `response` (text) equal to the reference `answer`? -> bool. Never raises.

    - What is not marked is wrong; but with grading "last_number" the last number in such a text counts, where the
      reference is one (others call that flexible extraction).
    - Letters alone are compared as text, whatever their case: \\text{(C)} = C; ab is not ba.
    - Where the reference is a number, the answer must be one too, written out: 1,000 = 1000.0 = \\$1{,}000, 3/2 = 1.5
      = 1\\frac{1}{2}, and x = 5, 90^\\circ, 15 \\text{ cm}^2, 10\\% count as 5, 90, 15, 10 (50\\% as 1/2, too), but 2^3
      not as 8. Six digits will do, 0.333333 = 1/3; no integer is another one. Units are not compared.
    - All else (LaTeX: lists, tuples, intervals, matrices, expressions) is math-verify's to compare. To it a list has no
      order, parentheses may be forgotten, and R is r.
    """
    found = find_answer(response)
    if found is None and grading == "last_number" and _number(_plain(answer)) is not None:
        found = next(iter(re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", response)[::-1]), None)
    if found is None or len(found) > 500:  # no reference is a page long, and parsers are slow
        return False
    found, answer = _plain(found), _plain(answer)
    if found == answer:
        return True
    word, reference = _word(answer), _number(answer)
    if word is not None:
        return (_word(found) or found) in (word, word.split("_")[0])  # 52 will do for 52_8, 52_7 will not
    if reference is not None:
        number = _number(re.sub(r"^[A-Za-z](_\w|\(\w\))? ?= ?", "", found))
        tolerance = min(1, abs(reference)) / 10**6
        scales = (1, 100) if "%" in found and "%" not in answer else (1,)
        return number is not None and any(abs(number / scale - reference) <= tolerance for scale in scales)
    if _HUGE.search(found) or ("inf" in found and "inf" not in answer):  # sympy may take \infty 1 for anything
        return False
    parse, verify, box = _math_verify(f"the answer {answer!r}")
    reference, found = (parse(f"\\boxed{{{text}}}", extraction_config=box) for text in (answer, found))
    return bool(verify(reference, found, allow_set_relation_comp=True))


def find_answer(text):
    """The last marked answer in a text, `\\boxed{...}` with nested braces or `#### ...` to the end of the line.

    -> str, or None where nothing is marked. The last one counts: a model may correct itself. A box that is never
    closed was cut off, and is no answer. Beside a box, `#### Note` is a heading, and `#### 42` an answer.
    """
    lines = [(m.start(), m.group(1).strip("* ")) for m in re.finditer(r"####[ \t]*([^\s#][^\n#]*)", text)]
    spans, opened = [], []  # the braces not closed yet: (where, where its content starts) of a box, None for others
    for m in re.finditer(r"\\+f?box(?:ed)?\s*\{|\\.|[{}]", text):  # \\. skips escaped braces
        if m.group() == "}":
            box = opened.pop() if opened else None
            if box:
                spans.append((box[0], text[box[1] : m.start()]))
        elif m.group().endswith("{") and m.group() != "\\{":
            opened.append((m.start(), m.end()) if m.group() != "{" else None)
    spans += [line for line in lines if not spans or _number(_plain(line[1])) is not None]
    return max(spans)[1].strip() or None if spans else None


# What does not change an answer: (pattern, replacement), in this order.
_LAYOUT = [
    (r"−", "-"),
    (r"\\(left|right|displaystyle)(?![A-Za-z]) ?", ""),
    (r"(?<=\d)(\{,\}|,\\!|(?<!\\)\\[,!;: ])\s*(?=\d{3})", ","),  # thousands: 10{,}080, 10,\!080, 10\,080
    (r"(?<!\\)\\[,!;: ]|~|\s+", " "),  # spaces; but \\ followed by one is the next row of a matrix
    (r"\\?\$", ""),
    (r"\\%", "%"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(mbox|textbf|textit|textrm|mathrm|mathbf)(?=\{)", r"\\text"),
    (r"^[a-z] ?\\in ?", ""),
    (r"[ .,;]+$", ""),
    (r" ?(\^ ?\\circ|\^ ?\{ ?\\circ ?\}|°)$", ""),
]
# After a number, a unit: \text{...}, %, or words, of which short ones could be variables; but 5 thousand is not 5.
_SCALE = r"(?! ?(hundred|thousand|[mb]illion|trillion|dozen))"
_WORDS = rf" ?\\text\{{{_SCALE}[^{{}}]*\}}| {_SCALE}([A-Za-z]{{3,}}|[ckm]m|kg|ft|in|hr)\b"
_UNIT = re.compile(rf"({_WORDS}| ?%)+( ?\^ ?\{{?[23]\}}?)?$")
# Towers of powers and exponents of five digits: nothing that a question asks for, and gigabytes to evaluate.
_HUGE = re.compile(r"(\^|\*\*)[ {(+-]*(\d{5}|[\d.]+ *(!|(\^|\*\*)[ {(+-]*\d))")


def _plain(text):
    """A short answer without layout: dollar signs, \\left and \\right, kinds of spaces and fonts, a final full stop."""
    text = text.strip()
    for pattern, new in _LAYOUT:
        text = re.sub(pattern, new, text)
    return text.strip()


def _word(text):
    """The text that an answer is, in lower case, or None: letters, \\text{of them}, or digits with a base, 52_8."""
    m = re.fullmatch(r"(?:\\text\{)?[ (]*([A-Za-z][A-Za-z ]*?)[ ).]*\}?|(\d\w*_)\{?(\w+)\}?", text)
    return "".join(part or "" for part in m.groups()).lower() if m else None


def _number(text):
    """The number that an answer is, as a Fraction, or None: 12, -1,234.5, 3/4, \\frac{3}{4}, 1\\frac{3}{4}, 1 3/4."""
    text = re.sub(r"^\\text\{([^{}]*)\}$|^\{([^{}]*)\}$|^\(([^(),]*)\)$", r"\1\2\3", text).strip()
    text = _UNIT.sub("", re.sub(r"_\{?10\}?$", "", text))
    text = re.sub(r"\\frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4 ", text).strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    m = re.fullmatch(r"([-+]?) *(?:(\d+) +(?=\d+ */))?(\d+\.?\d*|\.\d+)(?: */ *(\d+))?", text)
    try:
        return int(m[1] + "1") * (int(m[2] or 0) + Fraction(m[3]) / int(m[4] or 1)) if m else None
    except (ZeroDivisionError, ValueError):  # ValueError: Python reads no number of more than 4,300 digits
        return None


def _math_verify(who):
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        refuse(f"{who} is LaTeX, graded by math-verify: pip install math-verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says when a comparison took longer than 5 s
    return parse, verify, [LatexExtractionConfig(boxed_match_priority=0)]  # else it takes any number near the answer
