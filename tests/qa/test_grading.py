r"""Which answers count as right. The references have the shapes that GSM8K, MATH-500, AIME24 and AMC23 have.

A grader errs in two ways: an answer written differently is not recognised, or another answer is let through. So there
are tables of both kinds, and the wrong answers are neighbours that a sloppy grader takes: digits that are contained,
swapped coordinates, the other bracket, the other sign.
"""

import random
import sys

import pytest

from plumbing import tasks
from plumbing.tasks import find_answer, grade

# {reference: answers}, compared without any package
RIGHT = {
    "72": ["72.0"], "27.0": ["27"], "025": ["25"], "9" * 400 + ".0": ["9" * 400], "0.5": [r"\frac{1}{2}"],
    "5": ["+5", "5.", "{5}", "x = 5", "f(x) = 5"], "-5": ["−5"],
    "2125": ["2,125"], "2,125": ["2125"], "1,450,000": ["1450000"], r"10,\!080": ["10,080", "10{,}080", r"10\,080"],
    r"11,\! 111,\! 111,\! 100": ["11,111,111,100"], r"\$32,\!348": [r"\$32{,}348"],
    r"\frac{1}{2}": [".5", r"50\%"], r"\dfrac{1}{2}": ["1/2"], r"\frac12": [r"\frac{2}{4}"], r"\frac43": [r"\tfrac 43"],
    r"-\frac{35}{9}": [r"\frac{-35}{9}"], r"\frac{14}{3}": [r"\left(\frac{14}{3}\right)"], r"\frac{1}{3}": ["0.333333"],
    r"1\frac{4}{5}": [r"\frac{9}{5}", "1.8", "1 4/5"], r"137 \frac{1}{2}": ["137.5"],
    r"\$36": ["36"], "36": [r"\$36"], r"\$18.90": ["$18.9$"], "10": [r"10\%", "10 percent"], r"10\%": ["10%"],
    r"90^\circ": ["90", r"90^{\circ}", "90°", "90 degrees"], r"\frac{270}7\text{ degrees}": [r"\frac{270}{7}"],
    r"15\mbox{ cm}^2": ["15", r"15 \, \text{cm}^{2}", r"15 \text{ square centimetres}"],
    r"864 \mbox{ inches}^2": [r"864\ \mathrm{in}^2"], r"5.4 \text{ cents}": ["5.4"],
    "42": ["42 apples", r"42\text{ apples}"],
    "2516_8": ["2516_{8}"], "4210_{5}": ["4210_5", "4210"], "255": ["255_{10}"],
    r"\text{Evelyn}": ["Evelyn"], "east": [r"\text{east}"], r"\text{east}": [r"\text{ East }"],
    r"\text{even}": [r"\textbf{even}"], r"\text{(C)}": ["C", "(C)", r"\text{C}", "c"],
}  # fmt: skip
WRONG = {
    "5": ["-5", "5.5", "2x = 5", "5x", "5 x", r"\sqrt{5}", "5 or 6"], "-5": ["5"], "8": ["2^3"],
    "123": ["12", "1,2,3"], "12": ["123", "21"], "56": ["5 6", "5, 6"], ".0000672": [".0000673"],
    r"11,\! 111,\! 111,\! 100": ["11111111101"], "58,500": ["58.500"], "1234": ["12,34", "1 234", "(1,234)"],
    r"\frac{1}{2}": ["2", "12"], r"\frac{14}{3}": [r"\frac{3}{14}"], r"\frac{1}{3}": ["0.333"],
    "1/23": [r"\frac{1}{2}3"], r"1\frac{4}{5}": [r"\frac{4}{5}"], r"\frac{14}{5}": ["1 4/5"], "0": [r"\frac{1}{0}"],
    r"\$18.90": ["1890"], "10": ["0.1"], "10%": ["1%"], r"90^\circ": [r"9^\circ"], r"15\mbox{ cm}^2": ["15^2"],
    "42": ["42 thousand", r"42\text{ million}"],
    "4210_{5}": ["4210_{6}", "555"], "255": ["255_8"],
    r"\text{east}": ["seat", "northeast"], r"\text{even}": ["odd"], r"\text{(C)}": [r"\text{(B)}", r"\text{(BC)}"],
}  # fmt: skip
# ... compared by math-verify: of every kind one, as most of it is that package's
RIGHT_LATEX = {
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \pi/2)"], "(8,-2)": ["8,-2"],
    "3, 5, 7": ["7, 5, 3", r"3, 5 \text{ and } 7"], "1,-2": [r"x=1 \text{ or } x=-2"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}"], "(3,4]": [r"\left(3,4\right]"],
    r"x \in [-2,7]": [r"-2 \le x \le 7"], r"(2,\infty)": ["x > 2"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(3,\infty) \cup (-\infty,2)"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}": [
        r"\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}"],
    r"3\sqrt{13}": [r"\sqrt{117}"], r"288 \pi": [r"288\pi \text{ cm}^3"], "6 - 5i": ["-5i+6"],
    "(a+5)(b+2)": ["ab+2a+5b+10"], "x=5": ["5"], "y = 2x + 3": ["2x+3", "2x - y + 3 = 0"],
}  # fmt: skip
WRONG_LATEX = {
    r"\left( 3, \frac{\pi}{2} \right)": [r"\left(\frac{\pi}{2}, 3\right)"], "(6,31,-1)": ["(6, 31)"],
    "(8,-2)": ["-2,8"], "3, 5, 7": ["3, 5", "357"], r"1 \pm \sqrt{19}": [r"1+\sqrt{19}"], "(3,4]": ["[3,4)", "(3,4)"],
    r"x \in [-2,7]": ["-2 < x < 7"], r"(2,\infty)": [r"[2,\infty)"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(-\infty,3) \cup (2,\infty)"],
    r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}": [
        r"\begin{pmatrix} -2 & -14 & -7 \end{pmatrix}", r"\begin{pmatrix} -2 \\ -7 \\ -14 \end{pmatrix}"],
    r"3\sqrt{13}": [r"3\sqrt{11}", "3", r"\infty 1"], r"288 \pi": ["288"], r"\pi": ["3.14"], "6 - 5i": ["6 + 5i"],
    "p - q": ["q - p"], "(a+5)(b+2)": ["(a+2)(b+5)"], "x=5": ["y = 5"], "y = 2x + 3": ["y = 2x - 3"],
}  # fmt: skip


def cases(*tables):
    """The answers of a table that are right, and of one that are wrong."""
    rows = [(table.items(), right) for table, right in zip(tables, (True, False))]
    return [(answer, ref, right) for items, right in rows for ref, answers in items for answer in answers]


@pytest.mark.parametrize("answer, reference, right", cases(RIGHT, WRONG))
def test_numbers_and_words(answer, reference, right, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    assert grade(f"So it is \\boxed{{{answer}}}.", reference) is right
    assert grade(f"So it is\n#### {answer}\n", reference) is right


@pytest.mark.parametrize("answer, reference, right", cases(RIGHT_LATEX, WRONG_LATEX))
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


FIND = {
    None: [
        "The answer is 42.", "", "\\boxed{4", "\\boxed{\\frac{1}{2}", "\\boxed{}", "\\boxed{42} but also \\boxed{ }",
        "####\n42", "\\boxed{" * 100_000,
    ],
    "42": [
        "\\boxed{42}", "\\boxed {42}", "\\fbox{42}", "\\boxed{\\boxed{42}}", "$$\\boxed{\n 42 \n}$$",
        "\\\\boxed{42}",  # escaped once too often
        "\\boxed{42} is the answer, since 6 · 7 = 42 and not 43.", "\\boxed{41}, no, \\boxed{42}",  # it corrects itself
        "\\boxed{42} and then \\boxed{4",  # cut off
        "\\boxed{" * 100_000 + "42}", "#### 42", "work <<1+1=2>>\n#### 42\nQuestion: more", "#### 41\n#### 42",
        "\\boxed{41}\n#### 42", "#### 41\nso \\boxed{42}", "#### \\boxed{42}", "\\boxed{42}\n#### Note\nThat is all.",
        "#### **42**",
    ],
    "Step 1: add": ["#### Step 1: add"],
    "\\frac{\\sqrt{3}}{2}": ["\\boxed{\\frac{\\sqrt{3}}{2}} and {more} text}"],
    "\\{1, 2\\}": ["\\boxed{\\{1, 2\\}}"],  # escaped braces do not count
    "\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}": ["\\boxed{\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}}"],
}  # fmt: skip


def test_the_last_marked_answer_is_found():
    for found, responses in FIND.items():
        for response in responses:
            assert find_answer(response) == found, response


ENDLESS = [
    "9**9**9", "9^{9^9}", "10^{10^{10^{10}}}", "2^{99999999999}", "1.5^{9^{9^9}}", "10^{10}!^{2}", "1e999", "-1e-999",
    "x + " * 100_000 + "x",
]  # fmt: skip
BROKEN = [
    "1/0", "\\frac{1}{0}", "0^{-1}", "\\frac{0}{0}", "nan", "inf", "\\infty - \\infty", "\\sqrt{-1}", "\\log 0",
    "\x00", "\ud800", "𝟙", "٣", "²", "\\", "\\\\", "}", "{", "{{{", "}}}", "\\{", "\\left(", "\\begin{pmatrix}",
    "\\frac", "\\frac{1}", "\\frac{1}{", "\\text{", "\\text{5", "\\sqrt[", "$", "$$", "%", "#", ",", ".", "-", "/",
    "1,", "(1,2", "1,2)", "[1,2}", "()", "[]", "\\{\\}", "x=", "=x", "=", "==", "<", "1<", "\\in", "\\cup", "\\pm",
    "_5", "5_", "9" * 5000, "9" * 450, "1/" + "9" * 450, "(" * 200, "x+" * 200 + "1", "\\boxed{" * 50, "&", "^", "_",
    "5_{", ",1", "\\frac{1}{" * 60 + "1" + "}" * 60, "__import__('os').getcwd()", "lambda: 0", "None", "\\int x",
    "\\sum_{k=1}", "\\lim",
]  # fmt: skip
REFERENCES = ["42", "\\frac{1}{3}", "\\text{(C)}", "4210_{5}", "3\\sqrt{13}", "(3,4]", "1,-2", "y = 2x + 3"]


def test_nothing_that_a_model_says_is_an_error(capfd):
    """Or right, or endless, or reported on stderr; with and without a box around it. Nor is a random mixture of it."""
    pytest.importorskip("math_verify")
    for text in ENDLESS + BROKEN:
        for reference in REFERENCES:
            for response in (f"\\boxed{{{text}}}", f"#### {text}", text):
                assert grade(response, reference) is False, (text[:99], reference)
    assert capfd.readouterr().err == ""
    pieces = [*BROKEN, *"{}()[]^_+-=<,.0123456789xyi ", "\\boxed{", "\\pi", "\\cdot", "\n", "####", "\\right)", "dx"]
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        assert grade(rng.choice([text, f"\\boxed{{{text}}}", f"#### {text}"]), rng.choice(REFERENCES)) in (True, False)


def test_only_sets_with_latex_need_math_verify(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)

    def load(answer):
        (tmp_path / "a.csv").write_text(f'question,answer\nHow many?,"{answer}"\n')
        return tasks.load_problems(str(tmp_path / "a.csv"), needs_answer=True)

    for answer in ("72", "2,125", "-\\frac{35}{9}", "90^\\circ", "\\text{(C)}", "4210_{5}", "15\\mbox{ cm}^2"):
        assert load(answer) == [tasks.Problem("How many?", answer)]
    for answer in ("3\\sqrt{13}", "(3,4]", "1,-2", "6 - 5i", "x=5"):
        with pytest.raises(SystemExit, match="pip install math-verify"):
            load(answer)
