r"""Which answers count as right. The references have the shapes that GSM8K, MATH-500, AIME24 and AMC23 have.

A grader errs in two ways: an answer written differently is not recognised, or another answer is let through. So each
table holds both kinds, and the wrong rows are neighbours that a sloppy grader takes: digits that are contained, swapped
coordinates, the other bracket, the other sign. Where it is a matter of opinion, the row's comment states the choice.
"""

import random
import sys

import pytest

from plumbing import tasks
from plumbing.tasks import find_answer, grade

# (answer, reference, right?): compared without any package
PLAIN = [
    # numbers
    ("72", "72", True),
    ("72.0", "72", True),
    ("27", "27.0", True),  # AMC23 has floats
    ("25", "025", True),  # AIME24 has leading zeros
    ("+5", "5", True),
    ("5.", "5", True),
    ("{5}", "5", True),
    ("−5", "-5", True),  # a typographic minus
    ("12", "123", False),
    ("123", "12", False),
    ("21", "12", False),
    ("-5", "5", False),
    ("5", "-5", False),
    ("5.5", "5", False),
    ("5 6", "56", False),
    ("5, 6", "56", False),
    ("1,2,3", "123", False),
    ("11111111101", "11,\\! 111,\\! 111,\\! 100", False),
    (".0000673", ".0000672", False),
    ("9" * 400, "9" * 400 + ".0", True),
    # thousands
    ("2,125", "2125", True),
    ("2125", "2,125", True),
    ("1450000", "1,450,000", True),
    ("10,080", "10,\\!080", True),
    ("10{,}080", "10,\\!080", True),
    ("10\\,080", "10,\\!080", True),
    ("11,111,111,100", "11,\\! 111,\\! 111,\\! 100", True),
    ("58.500", "58,500", False),  # a decimal point, not a separator
    ("12,34", "1234", False),
    ("1 234", "1234", False),
    ("(1,234)", "1234", False),  # a point
    # fractions and decimals
    ("\\frac{1}{2}", "0.5", True),
    (".5", "\\frac{1}{2}", True),
    ("1/2", "\\dfrac{1}{2}", True),
    ("\\frac{2}{4}", "\\frac12", True),
    ("\\tfrac 43", "\\frac43", True),
    ("-\\frac{35}{9}", "-\\frac{35}{9}", True),
    ("\\frac{-35}{9}", "-\\frac{35}{9}", True),
    ("\\left(\\frac{14}{3}\\right)", "\\frac{14}{3}", True),
    ("0.333333", "\\frac{1}{3}", True),  # six digits will do
    ("0.333", "\\frac{1}{3}", False),
    ("\\frac{3}{14}", "\\frac{14}{3}", False),
    ("2", "\\frac{1}{2}", False),
    ("12", "\\frac{1}{2}", False),
    ("\\frac{1}{2}3", "1/23", False),
    ("\\frac{9}{5}", "1\\frac{4}{5}", True),
    ("1.8", "1\\frac{4}{5}", True),
    ("1 4/5", "1\\frac{4}{5}", True),
    ("1 4/5", "\\frac{14}{5}", False),
    ("\\frac{4}{5}", "1\\frac{4}{5}", False),
    ("137.5", "137 \\frac{1}{2}", True),
    ("\\frac{1}{0}", "0", False),
    # money, percent, units: not compared, the question asks for them
    ("36", "\\$36", True),
    ("\\$36", "36", True),
    ("$18.9$", "\\$18.90", True),
    ("1890", "\\$18.90", False),
    ("\\$32{,}348", "\\$32,\\!348", True),
    ("10\\%", "10", True),
    ("10%", "10\\%", True),
    ("10 percent", "10", True),
    ("50\\%", "\\frac{1}{2}", True),
    ("0.1", "10", False),  # but a tenth is not an answer of 10 (percent)
    ("1%", "10%", False),
    ("90", "90^\\circ", True),
    ("90^{\\circ}", "90^\\circ", True),
    ("90°", "90^\\circ", True),
    ("90 degrees", "90^\\circ", True),
    ("9^\\circ", "90^\\circ", False),
    ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}", True),
    ("15", "15\\mbox{ cm}^2", True),
    ("15 \\, \\text{cm}^{2}", "15\\mbox{ cm}^2", True),
    ("15 \\text{ square centimetres}", "15\\mbox{ cm}^2", True),
    ("15^2", "15\\mbox{ cm}^2", False),
    ("864\\ \\mathrm{in}^2", "864 \\mbox{ inches}^2", True),
    ("5.4", "5.4 \\text{ cents}", True),
    ("42 apples", "42", True),
    ("42\\text{ apples}", "42", True),
    ("42 thousand", "42", False),
    ("42\\text{ million}", "42", False),
    # names and expressions
    ("x = 5", "5", True),
    ("f(x) = 5", "5", True),
    ("2x = 5", "5", False),
    ("5x", "5", False),
    ("5 x", "5", False),
    ("\\sqrt{5}", "5", False),
    ("5 or 6", "5", False),
    ("2^3", "8", False),  # not written out
    # other bases
    ("2516_{8}", "2516_8", True),
    ("4210_5", "4210_{5}", True),
    ("4210", "4210_{5}", True),  # the question says in which base
    ("4210_{6}", "4210_{5}", False),
    ("555", "4210_{5}", False),
    ("255_{10}", "255", True),
    ("255_8", "255", False),
    # words
    ("Evelyn", "\\text{Evelyn}", True),
    ("\\text{east}", "east", True),
    ("\\text{ East }", "\\text{east}", True),
    ("\\textbf{even}", "\\text{even}", True),
    ("odd", "\\text{even}", False),
    ("seat", "\\text{east}", False),  # to computer algebra, both are a·e·s·t
    ("northeast", "\\text{east}", False),
    ("C", "\\text{(C)}", True),
    ("(C)", "\\text{(C)}", True),
    ("\\text{C}", "\\text{(C)}", True),
    ("c", "\\text{(C)}", True),
    ("\\text{(B)}", "\\text{(C)}", False),
    ("\\text{(BC)}", "\\text{(C)}", False),
]
# compared by math-verify
LATEX = [
    # tuples, lists, sets
    ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
    ("\\left(\\frac{\\pi}{2}, 3\\right)", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
    ("(1.5,-13)", "\\left( \\frac{3}{2}, -13 \\right)", True),
    ("(\\frac32, 13)", "\\left( \\frac{3}{2}, -13 \\right)", False),
    ("(6, 31, -1)", "(6,31,-1)", True),
    ("(31, 6, -1)", "(6,31,-1)", False),
    ("(6, 31)", "(6,31,-1)", False),
    ("(4, 3)", "(3,4)", False),
    ("8,-2", "(8,-2)", True),  # parentheses forgotten
    ("-2,8", "(8,-2)", False),
    ("7, 5, 3", "3, 5, 7", True),  # solutions come in no order
    ("3, 5 \\text{ and } 7", "3, 5, 7", True),
    ("3, 5", "3, 5, 7", False),
    ("357", "3, 5, 7", False),
    ("x=1 \\text{ or } x=-2", "1,-2", True),
    ("-1,2", "1,-2", False),
    ("1+\\sqrt{19}, 1-\\sqrt{19}", "1 \\pm \\sqrt{19}", True),
    ("1+\\sqrt{19}", "1 \\pm \\sqrt{19}", False),
    ("-2, 1+\\sqrt5, 1-\\sqrt5", "\\{1\\pm\\sqrt{5},-2\\}", True),
    ("\\{1\\pm\\sqrt{5}\\}", "\\{1\\pm\\sqrt{5},-2\\}", False),
    # intervals
    ("\\left(3,4\\right]", "(3,4]", True),
    ("[3,4)", "(3,4]", False),
    ("(3,4)", "(3,4]", False),
    ("[2,4]", "(2,4)", False),
    ("x \\in [-2, 7]", "[-2,7]", True),
    ("-2 \\le x \\le 7", "x \\in [-2,7]", True),
    ("-2 < x < 7", "x \\in [-2,7]", False),
    ("x > 2", "(2,\\infty)", True),
    ("[2,\\infty)", "(2,\\infty)", False),
    ("(3,\\infty) \\cup (-\\infty,2)", "(-\\infty, 2) \\cup (3, \\infty)", True),
    ("(-\\infty,3) \\cup (2,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)", False),
    ("(0,36)", "(0,9) \\cup (9,36)", False),
    # matrices
    ("\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\\\ \\frac53 \\end{bmatrix}",
     "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}", True),
    ("\\begin{pmatrix} -2 & -14 & -7 \\end{pmatrix}", "\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}", False),
    ("\\begin{pmatrix} -2 \\\\ -7 \\\\ -14 \\end{pmatrix}", "\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}", False),
    ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 1 \\end{pmatrix}", "\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}", False),
    # expressions
    ("\\sqrt{117}", "3\\sqrt{13}", True),
    ("3\\sqrt{11}", "3\\sqrt{13}", False),
    ("3", "3\\sqrt{13}", False),
    ("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}", True),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{\\sqrt{3}}{3}", False),
    ("288\\pi \\text{ cm}^3", "288 \\pi", True),
    ("288", "288 \\pi", False),
    ("3.14", "\\pi", False),
    ("-5i+6", "6 - 5i", True),
    ("6 + 5i", "6 - 5i", False),
    ("q - p", "p - q", False),
    ("ab+2a+5b+10", "(a+5)(b+2)", True),
    ("(a+2)(b+5)", "(a+5)(b+2)", False),
    ("1 - x + x^2 - x^3 - x^4 + x^5", "x^5 - x^4 + x^3 - x^2 + x - 1", False),
    ("-1 + x - x^2 + x^3 - x^4 + x^5", "x^5 - x^4 + x^3 - x^2 + x - 1", True),
    ("\\frac{9a+11}{20}", "\\frac{11+9a}{20}", True),
    ("\\frac{\\cos x}{\\sin x}", "\\cot x", True),
    ("\\tan x", "\\cot x", False),
    # equations
    ("5", "x=5", True),
    ("y = 5", "x=5", False),
    ("2x+3", "y = 2x + 3", True),
    ("2x - y + 3 = 0", "y = 2x + 3", True),
    ("y = 2x - 3", "y = 2x + 3", False),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0", True),
    ("5x-7y+11z-4=0", "5x - 7y + 11z + 4 = 0", False),
    ("\\infty 1", "3\\sqrt{13}", False),  # sympy has been seen to find these equal
]  # fmt: skip


@pytest.mark.parametrize("answer, reference, right", PLAIN)
def test_numbers_and_words(answer, reference, right, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    assert grade(f"So it is \\boxed{{{answer}}}.", reference) is right
    assert grade(f"So it is\n#### {answer}\n", reference) is right


@pytest.mark.parametrize("answer, reference, right", LATEX)
def test_latex(answer, reference, right):
    pytest.importorskip("math_verify")
    assert grade(f"So it is $\\boxed{{{answer}}}$.", reference) is right


@pytest.mark.parametrize(
    "response, reference, right",
    [
        ("It costs 5 dollars, so 3 cost $1,215.50.", "1215.5", True),
        ("The answer is -3", "-3", True),
        ("The answer is 3/4.", "0.75", True),
        ("12 apples, and not 13", "12", False),
        ("nothing at all", "12", False),
        ("\\boxed{12}, as 13 is too many", "12", True),  # a mark goes before
        ("\\boxed{13}, or 12", "12", False),
        ("it is C", "\\text{(C)}", False),  # numbers only
        ("between 3 and 4", "(3,4]", False),
    ],
)
def test_the_last_number_counts_where_it_is_asked_for_and_nothing_is_marked(response, reference, right):
    assert grade(response, reference, "last_number") is right
    assert grade(response, reference) is (right and "boxed" in response)


@pytest.mark.parametrize(
    "response, found",
    [
        ("The answer is 42.", None),  # not marked
        ("", None),
        ("\\boxed{42}", "42"),
        ("\\boxed{42} is the answer, since 6 · 7 = 42 and not 43.", "42"),
        ("\\boxed{41}, no, \\boxed{42}", "42"),  # a model may correct itself
        ("\\boxed{42} and then \\boxed{4", "42"),  # cut off
        ("\\boxed{4", None),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{\\frac{\\sqrt{3}}{2}} and {more} text}", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces do not count
        ("\\boxed{\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}"),
        ("\\boxed {42}", "42"),
        ("\\fbox{42}", "42"),
        ("\\\\boxed{42}", "42"),  # escaped once too often
        ("$$\\boxed{\n 42 \n}$$", "42"),
        ("\\boxed{\\boxed{42}}", "42"),
        ("\\boxed{}", None),
        ("\\boxed{42} but also \\boxed{ }", None),
        ("#### 42", "42"),
        ("work <<1+1=2>>\n#### 42\nQuestion: more", "42"),
        ("#### 41\n#### 42", "42"),
        ("####\n42", None),
        ("\\boxed{41}\n#### 42", "42"),
        ("#### 41\nso \\boxed{42}", "42"),
        ("#### \\boxed{42}", "42"),
    ],
)
def test_find_answer(response, found):
    assert find_answer(response) == found


def test_a_gsm8k_row():
    row = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
    assert grade(row, "72") and not grade(row, "24") and not grade(row.replace("####", "##"), "72")


ENDLESS = [
    "9**9**9", "9^{9^9}", "10^{10^{10^{10}}}", "2^{99999999999}", "1.5^{9^{9^9}}", "10^{10}!^{2}", "1e999", "-1e-999",
]  # fmt: skip
BROKEN = [
    "1/0", "\\frac{1}{0}", "0^{-1}", "\\frac{0}{0}", "nan", "inf", "\\infty - \\infty", "\\sqrt{-1}", "\\log 0",
    "\x00", "\ud800", "𝟙", "٣", "²", "\\", "\\\\", "}", "{", "{{{", "}}}", "\\{", "\\left(", "\\begin{pmatrix}",
    "\\frac", "\\frac{1}", "\\frac{1}{", "\\text{", "\\text{5", "\\sqrt[", "$", "$$", "%", "#", ",", ".", "-", "/", "1,",
    "(1,2", "1,2)", "[1,2}", "()", "[]", "\\{\\}", "x=", "=x", "=", "==", "<", "1<", "\\in", "\\cup", "\\pm", "_5", "5_",
    "9" * 5000, "9" * 450, "1/" + "9" * 450, "(" * 200, "x+" * 200 + "1", "\\boxed{" * 50, "&", "^", "_", "5_{", ",1",
    "\\frac{1}{" * 60 + "1" + "}" * 60, "__import__('os').getcwd()", "lambda: 0", "None", "\\int x", "\\sum_{k=1}", "\\lim",
]  # fmt: skip
REFERENCES = ["42", "\\frac{1}{3}", "\\text{(C)}", "4210_{5}", "3\\sqrt{13}", "(3,4]", "1,-2", "y = 2x + 3"]


def test_nothing_that_a_model_says_is_an_error(capfd):
    """Or right, or endless, or reported on stderr; with and without a box around it."""
    pytest.importorskip("math_verify")
    for text in ENDLESS + BROKEN:
        for reference in REFERENCES:
            for response in (f"\\boxed{{{text}}}", f"#### {text}", text):
                assert grade(response, reference) is False, (text, reference)
    assert capfd.readouterr().err == ""


def test_random_text_is_no_error():
    pytest.importorskip("math_verify")
    pieces = [*BROKEN, *"{}()[]^_+-=<,.0123456789xyi ", "\\boxed{", "\\pi", "\\cdot", "\n", "####", "\\right)", "dx"]
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        assert grade(rng.choice([text, f"\\boxed{{{text}}}", f"#### {text}"]), rng.choice(REFERENCES)) in (True, False)


def test_responses_without_end():
    """Boxes that are opened again and again and never closed; and an answer that is no answer but an essay."""
    assert find_answer("\\boxed{" * 100_000) is None
    assert find_answer("\\boxed{" * 100_000 + "42}") == "42"
    assert not grade("\\boxed{" + "x + " * 100_000 + "x}", "3\\sqrt{13}")


def test_only_sets_with_latex_need_math_verify(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)

    def load(answer):
        (tmp_path / "a.csv").write_text(f'question,answer\nHow many?,"{answer}"\n')
        return tasks.load_problems(str(tmp_path / "a.csv"), needs_answer=True)

    for answer in ("72", "2,125", "-\\frac{35}{9}", "90^\\circ", "\\text{(C)}", "4210_{5}", "15\\mbox{ cm}^2"):
        assert load(answer)[0].answer == answer
    for answer in ("3\\sqrt{13}", "(3,4]", "1,-2", "6 - 5i", "x=5"):
        with pytest.raises(SystemExit, match="pip install math-verify"):
            load(answer)
