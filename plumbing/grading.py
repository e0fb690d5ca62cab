r"""Where a text says its answer, and whether that equals the reference.

A reference that is a number, an option's letter or a word is compared by the few rules below. All else is LaTeX, and
math-verify compares it with the settings of TRL's `accuracy_reward`. Units are dropped and never compared.
"""

import logging
import re
import threading
from decimal import Decimal
from fractions import Fraction

LONGEST = 500  # characters of an answer: none that is asked for is longer, and parsers are slow

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]")  # \\. steps over escaped braces
_MARK = re.compile(r"(?<!#)####[ \t*$\\]*([-+−]?\$?[\d,]*\.?\d+(?:/\d+)?%?)([^\n#]{0,80})")
# What stands behind a number that is none: 2024-01-05, 2nd, 1. Add, 1: add, 1 Addition.
_NO_ANSWER = re.compile(r"\w|[-.,:/\\{}]+\d|[\s*]*[-–—.:)]+[\s*]*[A-Za-z]|\s+[A-Z][a-z]")


def find_answer(text):
    r"""The answer that a text marks -> str, or None where it marks none. These are the field's conventions.

    The last `\boxed{...}` with content counts, as a model may correct itself; a box that is never closed is none.
    Without a box the first `#### number` counts, as a model may ask itself more; `#### 1. Add` is a heading.
    """
    boxes, open_braces = [], []  # (start, end) of each box's content; where open braces start, None if not a box's
    for m in _BRACES.finditer(text):
        if m.group() == "}":
            start = open_braces.pop() if open_braces else None
            boxes += [(start, m.start())] if start else []
        elif m.group().endswith("{") and m.group() != r"\{":
            open_braces.append(m.end() if len(m.group()) > 1 else None)
    contents = (text[start:end].strip() for start, end in sorted(boxes, reverse=True))
    numbers = (m.group(1).replace("$", "") for m in _MARK.finditer(text) if not _NO_ANSWER.match(m.group(2)))
    return next(filter(None, contents), None) or next(numbers, None)


def grade(text, answer):
    r"""Is the answer that a text marks equal to the reference `answer`? -> bool. No text makes it fail or hang.

    - Numbers: 1,000 = 1000.0 = \$1{,}000, 3/2 = 1.5 = 1\frac{1}{2}, 50\% = 50 or 1/2, and `x = 5`, `2 + 3 = 5` and
      `5 \text{ cm}^2` are 5. They must be written out: 2^3 is not 8, nor is a date a number. Six digits of a fraction
      are enough, as in 0.333333 = 1/3, but no integer equals another.
    - Letters and words: C = `\text{(C)}` = `C: because`, and `\text{East}` = east. Bases: 52_8 = 52_{8} or 52.
    - All else is equal as text, or by math-verify's verdict. Without that package this is a ModuleNotFoundError.
    """
    found = find_answer(text)
    if found is None or found == answer.strip():
        return found is not None
    reference, word = _number(answer), _word(answer)
    if reference is not None:
        number, error = _number(found), min(1, abs(reference)) / 10**6
        shares = (1, 100) if "%" in found and "%" not in answer else (1,)
        return number is not None and any(abs(number / share - reference) <= error for share in shares)
    if word is not None:
        return _word(found) == word or found == word.partition("_")[0]
    return _math_verify(found, answer)


def clean_reference(value):
    r"""A reference as files hold it (a number, GSM8K's `... #### 42`, a solution with a box) -> the answer, or None."""
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan", "na", "none", "null"):  # how CSV files and pandas write nothing
        return None
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", text):
        return format(Decimal(text), "f")
    return find_answer(text) or text.rpartition("####")[2].strip() or None


def can_be_graded(answer):
    """Whether a reference is an answer, and no sentence, such as a solution without a box -> bool"""
    text = re.sub(_FONT + r"|\\[A-Za-z]+", " ", answer)
    word = _word(answer)
    known = _number(answer) is not None or word and len(word) == 1  # an option with its text
    return known or len(re.findall(r"[A-Za-z]{2,}", text)) < (5 if word else 3)


def needs_math_verify(answer):
    """Does it take math-verify to grade by this reference? -> bool. Without it, data with such a one are refused."""
    return _number(answer) is None and _word(answer) is None


_FONT = r"\\(?:text|mbox|math)[a-z]*\{([^{}]*)\}"
_LAYOUT = [  # what does not change a number: (pattern, replacement), in this order
    ("−", "-"),
    (r"\\(left|right|displaystyle)(?![A-Za-z])|\\?[$€£¥]|\\[()\[\]]", " "),
    (r"(?<=\d)(\{,\}|,\\!|\\[,;: ])\s*(?=\d{3})", ","),  # thousands: 10{,}080, 10,\!080, 10\,080
    (_FONT, r" \1"),
    (r"\\(?:[,;:! ]|q?quad)|~|\s+", " "),
    (r"(?<=\d) ?\\(?:times|cdot) ?10 ?\^ ?\{?(-?\d+)\}?", r"e\1"),
    (r"\\[dt]?frac ?(?:\{ ?(-?\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))", r" \1\2/\3\4 "),
]
# One unit: %, degrees, or words and a power. Most single letters could be variables; and five thousand is not five.
_FACTOR = r"(?!.*\b(?:hundred|thousand|[mb]illion|trillion|dozen|half|and|or|plus|minus|times|squared|cubed)\b)"
_WORDS = rf" +{_FACTOR}(?:[A-Za-z]{{2,}}|[ghms])[A-Za-z /]*(?: ?\^ ?\{{?[23]\}}?|[²³])?"
_UNIT = re.compile(rf"(?: ?\\?%| ?°| ?\^ ?\{{? ?\\circ ?\}}?|{_WORDS})$")
_NUMBER = re.compile(  # the sign, the 1 of 1 3/4, digits, exponent, denominator
    r"([-+]?) *(?:(\d+) +(?=\d+ ?/))?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)([eE]-?\d{1,3})?(?: ?/ ?(0*[1-9]\d*))?"
)


def _number(text):
    """The number to which a text reduces -> Fraction, or None. Layout, a left-hand side and one unit are dropped."""
    if len(text) > LONGEST:
        return None
    for pattern, new in _LAYOUT:
        text = re.sub(pattern, new, text)
    left, _, text = text.rpartition("=")
    text = re.sub(r"^[({]([^(){},]*)[)}]$", r"\1", text.strip("* ").rstrip("* .,;"))
    m = _NUMBER.fullmatch(_UNIT.sub("", text).strip())
    # x = 1, y = 5 is no chain of equal things, and what -x or 5x - 7y equals is not the answer
    if not m or re.search(r"[,;<>!≠]|\b(or|and)\b|=.*[A-Za-z] *$|[-+*/\d] *[A-Za-z](?![A-Za-z])", left):
        return None
    sign, whole, digits, exponent, denominator = m.groups("")
    size = int(whole or 0) + Fraction(digits.replace(",", "") + exponent) / int(denominator or 1)
    return -size if sign == "-" else size


def _word(text):
    r"""What a text of letters says: `\text{(C)}` and `C: because` are c, `\text{East}` is east, 52_{8} is 52_8."""
    text = " ".join(re.sub(_FONT + r"|\\?\$|\\[(),;:! ]|[~*]|\\q?quad", r" \1", text[:LONGEST]).split()).rstrip(".")
    option = re.fullmatch(r"(?:\(([A-Za-z])\)|([A-Za-z])[:.)])(?!.*\b[A-Z][.)]).*", text)
    word = option or re.fullmatch(r"\(?([A-Za-z][A-Za-z ]*)\)?|(\d\w*_\w+)", re.sub(r"_\{(\w+)\}", r"_\1", text))
    return (word[1] or word[2]).lower() if word else None


# Towers of powers and long exponents, which sympy would evaluate; no alarm interrupts the product of two integers.
# Its verdict on infinity times a number changes from one process to the next.
_HUGE = re.compile(r"\^[ {(+-]*(\d{5}|[\d.]+[ )}]*[!^])")


def _math_verify(found, answer):
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    if len(found) > LONGEST or _HUGE.search(found.replace("**", "^")) or ("inf" in found and "inf" not in answer):
        return False
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports every timeout
    seconds = 5 if threading.current_thread() is threading.main_thread() else None  # its timeouts are signals
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    try:
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
        found = parse(f"\\boxed{{{found}}}", [config], extraction_mode="first_match", parsing_timeout=seconds)
        return bool(verify(gold, found, timeout_seconds=seconds))
    except Exception:  # sympy and the parser raise all kinds
        return False
