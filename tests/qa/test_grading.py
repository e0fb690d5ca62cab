r"""Which answers count as right. The references have the shapes that GSM8K, MATH-500, AIME24 and AMC23 have.

A grader errs in two ways: it does not recognise an answer that is written differently, or it lets another one through.
The wrong answers below are neighbours that a sloppy grader takes: contained digits, swapped coordinates, another sign.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from plumbing.grading import clean_reference, find_answer, grade, needs_math_verify

# {reference: answers}, compared without any package
RIGHT = {
    "72": ["72.0", "{72}", "72.", "+72", r"\text{72}"], "27.0": ["27"], "-5": ["−5", "- 5", "-$5$"], "025": ["25"],
    "20": ["18 + 2 = 20", r"\text{Total} = 20", "x = 20", "f(x) = 20", "n = 4 + 16 = 20", r"x = \frac{40}{2} = 20"],
    "18": [r"\(18\)", "**18**", "€18", "$18$", "18 km/h", "18 apples", r"18\text{ m}", r"18\text{ cm}^2", "18 cm²"],
    "2125": ["2,125", r"\$2,125", "2{,}125"], r"11,\! 111,\! 111,\! 100": ["11,111,111,100"], r"10,\!080": [r"10\,080"],
    "1000000": ["1e6", "1,000,000", r"10^6 = 1{,}000{,}000"], "0.00005": ["5e-05", r"5 \times 10^{-5}"],
    r"\frac{1}{2}": [".5", r"50\%", "1/2", "0.50"], r"\frac12": [r"\frac{2}{4}"], r"\frac43": [r"\tfrac 43"],
    r"-\frac{35}{9}": [r"\frac{-35}{9}", "-35/9"], r"\frac{14}{3}": [r"\left(\frac{14}{3}\right)", r"4\frac{2}{3}"],
    r"\frac{1}{3}": ["0.333333"], r"1\frac{4}{5}": [r"\frac{9}{5}", "1.8", "1 4/5"], "10": [r"10\%", "10 percent"],
    r"90^\circ": ["90", r"90^{\circ}", "90°", "90 degrees"], r"\frac{270}7\text{ degrees}": [r"\frac{270}{7}"],
    r"864 \mbox{ inches}^2": [r"864\ \mathrm{in}^2", "864"], "9" * 400 + ".0": ["9" * 400], r"\$18.90": ["18.9"],
    "2516_8": ["2516_{8}", "2516"], r"\text{Evelyn}": ["Evelyn"], "east": [r"\text{ East }", r"\textbf{east}"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}", "c"], "E": ["E: both of them", r"\text{(E)}"], "B": [r"\textbf{(B)}\ 27"],
}  # fmt: skip
WRONG = {
    "5": ["-5", "5.5", "5x", "5 x", r"\sqrt{5}", "5 or 6", "6 = 5 + 1", "x > 5", "x = 1, y = 5", "x = 1 or x = 5"],
    "x = 5": ["-x = 5", "2x = 5"],
    "123": ["12", "1,2,3", "321"], "56": ["5 6", "5, 6"], "1234": ["12,34", "1 234", "(1,234)"], "58,500": ["58.500"],
    "2018": ["2024-01-05"], r"\frac{10}{30}": ["10:30"], "4": ["7-3", "2^2"], "2": ["H2O"], ".2": ["192.168.0.1"],
    r"\frac{1}{2}": ["2", "12"], r"\frac{14}{3}": [r"\frac{3}{14}"], r"\frac{1}{3}": ["0.333"], "2/3": ["2"],
    r"1\frac{4}{5}": [r"\frac{4}{5}"], r"\frac{14}{5}": ["1 4/5"], "0": [r"\frac{1}{0}", "1/0"], r"\$18.90": ["1890"],
    "10": ["0.1"], "10%": ["1%"], "15": ["15^2"], "1000000": ["1000001", "1e5"], ".0000672": [".0000673"],
    "42": ["42 thousand", r"42\text{ million}", "42 and a half"], "4210_{5}": ["4210_{6}", "555"],
    "east": ["seat", "northeast"], r"\text{(C)}": [r"\text{(B)}", r"\text{(BC)}", "(C) or (D)"], "E": ["5", "e^x"],
}  # fmt: skip
# ... compared by math-verify: one of every kind, as most of it is that package's
RIGHT_LATEX = {
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \pi/2)"], "3, 5, 7": ["7, 5, 3", r"3, 5 \text{ and } 7"],
    "1,-2": [r"x=1 \text{ or } x=-2"], r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}"], "2k": [r"k \cdot 2"],
    "(3,4]": [r"\left(3,4\right]"], r"x \in [-2,7]": ["[-2, 7]"], r"3\sqrt{13}": [r"\sqrt{117}"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(3,\infty) \cup (-\infty,2)"], r"11\sqrt2": [r"11\sqrt{2}"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": [r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}"],
    r"288 \pi": [r"288\pi \text{ cm}^3"], "6 - 5i": ["-5i+6"], "(a+5)(b+2)": ["ab+2a+5b+10"], "y = 2x + 3": ["2x+3"],
    "5x - 7y + 11z + 4 = 0": ["11z + 5x - 7y + 4 = 0"],
}  # fmt: skip
WRONG_LATEX = {
    r"\left( 3, \frac{\pi}{2} \right)": [r"\left(\frac{\pi}{2}, 3\right)"], "(6,31,-1)": ["(6, 31)"],
    "(8,-2)": ["-2,8"], "3, 5, 7": ["3, 5", "357"], r"1 \pm \sqrt{19}": [r"1+\sqrt{19}"], "(3,4]": ["[3,4)", "(3,4)"],
    r"x \in [-2,7]": ["-2 < x < 7"], r"(-\infty, 2) \cup (3, \infty)": [r"(-\infty,3) \cup (2,\infty)"],
    r"\begin{pmatrix} -2 \\ -7 \end{pmatrix}": [r"\begin{pmatrix} -7 \\ -2 \end{pmatrix}"], "p - q": ["q - p"],
    "(a+5)(b+2)": ["(a+2)(b+5)"], r"3\sqrt{13}": ["3"], r"288 \pi": ["288"], r"\pi": ["3.14"], "6 - 5i": ["6 + 5i"],
    "5x - 7y + 11z + 4 = 0": ["5x = 0", "0", "-5x - 7y + 11z + 4 = 0"],
}  # fmt: skip


def cases(right, wrong):
    tables = ((right, True), (wrong, False))
    return [(answer, ref, is_right) for table, is_right in tables for ref in table for answer in table[ref]]


@pytest.mark.parametrize("answer, reference, right", cases(RIGHT, WRONG))
def test_numbers_letters_and_words(answer, reference, right, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    assert grade(f"So it is \\boxed{{{answer}}}.", reference) is right
    assert not needs_math_verify(reference)


@pytest.mark.parametrize("answer, reference, right", cases(RIGHT_LATEX, WRONG_LATEX))
def test_latex_is_graded_as_trl_does(answer, reference, right):
    """The settings are those of `accuracy_reward`, written down a second time, and for a whole response."""
    math_verify, latex = pytest.importorskip("math_verify"), pytest.importorskip("latex2sympy2_extended")
    response = f"So it is $\\boxed{{{answer}}}$."
    assert grade(response, reference) is right and needs_math_verify(reference)
    config = math_verify.LatexExtractionConfig(False, 0, latex.NormalizationConfig(units=True))
    found = math_verify.parse(response, [config], extraction_mode="first_match")
    assert math_verify.verify(math_verify.parse(f"$\\boxed{{{reference}}}$"), found) is right


def test_latex_in_a_thread_and_without_math_verify(monkeypatch):
    pytest.importorskip("math_verify")
    assert ThreadPoolExecutor(1).submit(grade, r"\boxed{\sqrt{117}}", r"3\sqrt{13}").result()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert grade(r"\boxed{3\sqrt{13}}", r"3\sqrt{13}") and not grade("3", r"3\sqrt{13}")
    with pytest.raises(ModuleNotFoundError):  # a verdict that depends on what is installed would be worse
        grade(r"\boxed{\sqrt{117}}", r"3\sqrt{13}")


FIND = {
    None: [
        "The answer is 42.", "", "\\boxed{4", "\\boxed{\\frac{1}{2}", "\\boxed{}", "####\n42", "\\boxed{" * 100_000,
        "\\" * 100_000, "####" * 100_000, "#### " * 100_000, "#### " + " " * 100_000, "#### Step 1: add", "#### 1. Add",
        "#### 1) add", "#### **1.** Add", "#### 1: add", "#### 1 - Add", "#### 2 Adding up", "#### 2nd step", "#### 5x",
        "#### 2024-01-05", "#### 10:30", "#### 7-3", "#### H2O", "#### 192.168.0.1", "#### 10{,}080", "#### (1) Add",
    ],
    "42": [
        "\\boxed{42}", "\\boxed {42}", "\\fbox{42}", "\\boxed{\\boxed{42}}", "$$\\boxed{\n 42 \n}$$", "\\\\boxed{42}",
        "\\boxed{42} is the answer, since 6 · 7 = 42 and not 43.", "\\boxed{41}, no, \\boxed{42}",
        "\\boxed{42} and then \\boxed{4", "\\boxed{42}. I put my final answer within \\boxed{}.",
        "\\boxed{42}\n#### 3. Check", "\\boxed{42}\n#### 41", "#### 41\nso \\boxed{42}", "#### \\boxed{42}",
        "#### 42", "work <<1+1=2>>\n#### 42\nQuestion: more\n#### 43", "#### Step 1: add\n#### 42", "#### 42.",
        "####42####41", "####42 ", "#### **42**", "#### $42", "#### \\$42", "#### $42$", "#### 42 dollars",
        "#### 1. Add\n40 + 2\n#### 42", "\\boxed{" * 100_000 + "42}", "\\boxed{42" + "}" * 100_000,
    ],
    "1,000": ["#### $1,000", "#### 1,000."], "-3.5": ["#### -3.5", "#### -$3.5"], "3/4": ["#### 3/4"],
    "\\frac{\\sqrt{3}}{2}": ["\\boxed{\\frac{\\sqrt{3}}{2}} and {more} text}"],
    "\\{1 \\\\{2}\\}": ["\\boxed{\\{1 \\\\{2}\\}}"],  # escaped braces do not count
    "14": ["<think>it is \\boxed{14}, but"],  # a response that was cut is judged by its text
}  # fmt: skip


@pytest.mark.parametrize("found", FIND)
def test_the_marked_answer_is_found(found):
    for response in FIND[found]:
        assert find_answer(response) == found, response[:99]


def test_references():
    for answer, values in {
        None: [None, float("nan"), "", " ", "NaN", "NA", "None"], "27": [27, " 27"], "27.0": [27.0],
        "0.00005": [5e-05, "5e-05"], "1000000": ["1e6"], "5": ["9 - 4 = <<9-4=5>>5\n#### 5"], "70,000": ["#### 70,000"],
        "3\\pi": ["So $\\boxed{3\\pi}$."], "B": ["so\n#### B"],
    }.items():  # fmt: skip
        assert [clean_reference(value) for value in values] == [answer] * len(values)


BROKEN = [
    "9**9**9", "9^{9^9}", "10^{10^{10^{10}}}", "2^{99999999999}", "10^{10}!^{2}", "1e999", "x + " * 100_000 + "x",
    "1/0", "\\frac{1}{0}", "0^{-1}", "nan", "\\infty 1", "\\frac{\\infty}{2}", "\x00", "\ud800", "𝟙", "٣", "²", "\\",
    "\\\\", "}", "{", "{{{", "}}}", "\\{", "\\left(", "\\begin{pmatrix}", "\\frac", "\\frac{1}{", "\\text{", "\\sqrt[",
    "$", "%", ",", ".", "-", "/", "1,", "(1,2", "[1,2}", "()", "x=", "=x", "=", "==", "1<", "\\in", "\\pm", "_5", "5_",
    "9" * 5000, "9" * 450, "1/" + "9" * 450, "(" * 200, "x+" * 200 + "1", "\\boxed{" * 50, "&", "^", "#", "None",
    "\\frac{1}{" * 60 + "1" + "}" * 60, "__import__('os').getcwd()", "lambda: 0", "\\sum_{k=1}", "1," * 50_000, "\\lim",
]  # fmt: skip
REFERENCES = ["42", "\\frac{1}{3}", "\\text{(C)}", "4210_{5}", "3\\sqrt{13}", "(3,4]", "1,-2", "y = 2x + 3"]


def test_nothing_that_a_model_says_is_an_error(capfd):
    """Nor right, endless, or reported on stderr. A random mixture of it is no error either."""
    pytest.importorskip("math_verify")
    for text in BROKEN:
        for reference in REFERENCES:
            for response in (f"\\boxed{{{text}}}", f"#### {text}", text):
                assert grade(response, reference) is False, (text[:99], reference)
    assert capfd.readouterr().err == ""
    pieces, rng = [*BROKEN, *"{}()[]^_+-=<,.0123456789xyi ", "\\boxed{", "\\pi", "\n", "####", "dx"], random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        assert grade(rng.choice([text, f"\\boxed{{{text}}}", f"#### {text}"]), rng.choice(REFERENCES)) in (True, False)
