"""Who ends how, and what is said in a loop: probabilities behind an answer that was said k times.

    python docs/endings.py                                  the base student as it begins
    python docs/endings.py runs/base-opd/model              ... and as a run left it

The prefixes are those of the toy: a problem, two lines that agree, and ####, digit, again and again. The last column is
how probable the same digit is once more, after another ####. Geometric means over 64 problems.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from plumbing.data import encode_prompts, load_problems  # noqa: E402

SAYS, COLUMNS = ("<|im_end|>", "<|endoftext|>", "####"), ("im_end", "endoftext", "####", "the same")


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
    """-> mean log-probabilities of SAYS as the next token, and of the same digit after another ####"""
    ids, found = AutoTokenizer.from_pretrained(ROOT / "toy" / "teacher").convert_tokens_to_ids(list(SAYS)), []
    for prefix in prefixes(k):
        now, then = model(torch.tensor([[*prefix, ids[-1]]])).logits[0, -2:].log_softmax(-1)
        found.append(torch.cat([now[ids], then[prefix[-1:]]]))
    return torch.stack(found).mean(0)


def main(student=ROOT / "toy" / "base_student"):
    torch.set_num_threads(1)  # models this small gain nothing from more
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (ROOT / "toy/teacher", student))
    print(f"{'':10}{'teacher':^40}   {'student':^40}")
    print(f"{'answers':10}" + "   ".join("".join(f"{word:>10}" for word in COLUMNS) for _ in range(2)))
    for k in (1, 2, 4, 8, 16):
        cells = ["".join(f"{p:10.1e}" for p in log_probs(model, k).exp().tolist()) for model in (teacher, student)]
        print(f"{k:<10}" + "   ".join(cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
