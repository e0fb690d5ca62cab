"""Who ends how, and what the teacher says of a loop: probabilities behind an answer that was said k times.

    python docs/endings.py                                  the student as it begins
    python docs/endings.py runs/lesson-opd/model            ... and as a run left it

The prefixes are those of the toy: a problem, two lines that agree, and ####, digit, again and again. Geometric means
over 64 problems.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from plumbing.data import encode_prompts, load_problems  # noqa: E402

SAYS = ("<|im_end|>", "<|endoftext|>", "####")


def prefixes(k, n=64):
    """-> n lists of token ids: prompt, two lines that reach the right result, the answer k times."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "teacher")
    problems = load_problems(str(ROOT / "toy" / "eval.jsonl"))[0][:n]
    encode_prompts(problems, tokenizer)
    for problem in problems:
        numbers, line = [int(x) for x in problem.question.split("+")], ""
        while len(numbers) > 1:  # the first pair first
            numbers = [(numbers[0] + numbers[1]) % 10, *numbers[2:]]
            line += "=" + "+".join(map(str, numbers))
        text = (line + "\n") * 2 + f"####{problem.answer}" * k
        yield [*problem.prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def log_probs(model, k):
    """-> mean log-probabilities of SAYS as the next token"""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "teacher")
    ids = tokenizer.convert_tokens_to_ids(list(SAYS))
    return torch.stack([model(torch.tensor([x])).logits[0, -1].log_softmax(-1)[ids] for x in prefixes(k)]).mean(0)


def main(student=ROOT / "toy" / "student"):
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (ROOT / "toy/teacher", student))
    print(f"{'':10}{'teacher':^36}   {'student':^36}")
    print(f"{'answers':10}" + "   ".join("".join(f"{word:>12}" for word in ("im_end", "endoftext", "####"))
                                         for _ in range(2)))  # fmt: skip
    for k in (1, 2, 4, 8, 16):
        cells = ["".join(f"{p:12.1e}" for p in log_probs(model, k).exp().tolist()) for model in (teacher, student)]
        print(f"{k:<10}" + "   ".join(cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
