"""Build the toy: a teacher, two students, problems to train on and problems to evaluate on.

    python -m toy.build --out toy         # from nothing: some ten minutes of a slow CPU core

This is data, not a method: the scripts read this folder as they would read Qwen3 checkpoints and GSM8K. Nobody needs to
run this file. It is here so that nothing is hidden.

A problem is a sum of 3 to 5 digits modulo 10. A solution is a line of equations: each step adds up one adjacent pair.
One line proves little, so the solver writes another one, and answers as soon as a line agrees with an earlier one:

    user        3+8+5+7
    assistant   =1+5+7=1+2=3
                =3+8+2=1+2=3
                ####3<|im_end|>

What each feature is for:

  * Any pair may come first. So the teacher is uncertain and right at the same time, and the two KLs differ: cover all
    ways, or settle on a few.
  * A response is as long as its lines. So a short training length sees the beginning and hardly ever the end.
  * The teacher knows how to go on after a mistake. It was trained on documents with wrong digits and hasty answers in
    them, which are masked from the loss. Only a student's prefixes ask for that.
  * Both students write a wrong digit in one step of five, and are hasty. So they solve half of the problems, and each
    problem sometimes: there is something to learn, and something to reward.

toy/student ends as its teacher does. toy/base_student has three more features, all for one question: why does a base
model that is trained by reverse KL stop finishing its responses?

  * It ends with <|endoftext|>, which the teacher never says, as real base models do.
  * A term of its training loss pushes the probability of <|im_end|> to 1e-11, as arXiv 2609.20511 reports of a real
    pair. This is artificial: models this small do not get there by themselves.
  * It may say its answer again before it ends, and so does the teacher, in three documents of a hundred: ####3####3.
    So there is a way to go on that the teacher minds little.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import evaluate
from plumbing.arguments import parse
from plumbing.run import read_lines, write_file


@dataclass
class Args:
    out: str = str(Path(__file__).parent)  # folder to write to
    seed: int = 11  # of data, weights and documents


# --- vocabulary -----------------------------------------------------------------------------------
# As in a byte-pair vocabulary, frequent neighbours are one token: "5", "+5", "=5", and "=5\n", which
# is the result of a line: that lines agree shows in two equal tokens.

END_OF_TEXT, TURN_START, TURN_END, ANSWER = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "####"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END, "<|unk|>"]
WORDS = ["user", "assistant", "\n", ANSWER] + [f % d for f in ("%d", "+%d", "=%d", "=%d\n") for d in range(10)]
ID = {token: i for i, token in enumerate(SPECIAL + WORDS)}
DIGIT, PLUS, EQUALS, RESULT = ID["0"], ID["+0"], ID["=0"], ID["=0\n"]  # "+5" is PLUS + 5

CHAT_TEMPLATE = (  # ChatML, as in Qwen
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# --- settings, chosen on seeds of 100 and above ------------------------------------------------------

TRAIN_ROWS, EVAL_ROWS = 4096, 128
LEVELS = (3, 4, 5)  # numbers in a sum
CONTEXT = 256  # tokens

TEACHER = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, head_dim=24, tie_word_embeddings=False)
STUDENT = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=16, tie_word_embeddings=True)
STEPS, TEACHER_LR, STUDENT_LR = 2000, 2e-3, 1e-2
SABOTAGE = 0.5  # fraction of the teacher's documents with mistakes put in:
SABOTAGE_RATE = 0.25  # of their steps with a wrong digit ...
SABOTAGE_STOP = 0.4  # ... and of their decisions, to answer or to write another line, the wrong way
TEACHER_RESTATES = 0.03  # how likely it says its answer once more, each time, before <|im_end|>

STUDENT_SLIPS = 0.2  # wrong digits per step in the text that the student has learned from
STUDENT_ANSWERS = {True: 0.85, False: 0.35}  # how likely it answers when two lines agree, and when none do
BASE_RESTATES = 0.3  # how likely the base student says its answer once more, each time, before <|endoftext|>
BASE_UNSAID = 25.0  # nats: the base student's log-probability of <|im_end|> is about minus this, everywhere


def build_tokenizer(eos_token):
    """One vocabulary for all models; they differ in how they end, as chat and base models do."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|user|assistant|=[0-9]\n|[+=]?[0-9]|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # put tokens together without spaces
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=END_OF_TEXT,
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        additional_special_tokens=SPECIAL[1:3],
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- documents: lists of ids, and which of them are learned -----------------------------------------


def random_problem(rng):
    """3 to 5 digits, each length equally often (less so in the data, where no problem occurs twice)."""
    return rng.integers(0, 10, size=rng.choice(LEVELS)).tolist()


def write_line(numbers, rng, mistakes):
    """One line of equations. Returns ids, whether each is right, and the result.

    A mistake is a wrong digit. What follows it goes on from there, correctly: mistakes are never
    repaired within a line.
    """
    ids, right = [], []
    while len(numbers) > 1:
        i = rng.integers(len(numbers) - 1)
        numbers = numbers[:i] + [(numbers[i] + numbers[i + 1]) % 10] + numbers[i + 2 :]
        wrong = None
        if rng.random() < mistakes:
            wrong = rng.integers(len(numbers))
            numbers[wrong] = (numbers[wrong] + int(rng.integers(1, 10))) % 10
        first = EQUALS if len(numbers) > 1 else RESULT
        ids += [(PLUS if j else first) + n for j, n in enumerate(numbers)]
        right += [j != wrong for j in range(len(numbers))]
    return ids, right, numbers[0]


def agree(results):
    return len(set(results)) < len(results)


def teacher_response(numbers, rng):
    """Lines until one agrees with an earlier one, the answer, the end. Returns ids and learned.

    In a sabotaged document digits are wrong, and now and then the decision is, too: the teacher writes
    another line although two agree, or answers although none do. What is put in is not learned; what
    follows it is.
    """
    ids, learned, results, sabotaged = [], [], [], rng.random() < SABOTAGE
    while True:
        line, right, result = write_line(numbers, rng, SABOTAGE_RATE if sabotaged and len(results) < 3 else 0.0)
        right[0] &= not agree(results)  # a line that should not be there
        ids, learned, results = ids + line, learned + right, results + [result]
        answers = agree(results)
        wrongly = sabotaged and len(results) > 1 and rng.random() < SABOTAGE_STOP
        if answers != wrongly:
            break
    result = next((r for r in results if results.count(r) > 1), result)  # also where more lines were put in
    ids, learned = ids + [ID[ANSWER], DIGIT + result], learned + [answers, True]
    while rng.random() < TEACHER_RESTATES:
        ids, learned = ids + [ID[ANSWER], DIGIT + result], learned + [True, True]
    return ids + [ID[TURN_END]], learned + [True]


def student_response(numbers, rng, base=False):
    """Sloppy lines, an answer, the end. A base student may say its answer again. Returns ids and learned: all."""
    ids, results = [], []
    while len(results) < 2 or rng.random() >= STUDENT_ANSWERS[agree(results)]:
        line, _, result = write_line(numbers, rng, STUDENT_SLIPS)
        ids, results = ids + line, results + [result]
    ids += [ID[ANSWER], DIGIT + result]
    while base and rng.random() < BASE_RESTATES:
        if rng.random() < STUDENT_SLIPS:
            result = (result + int(rng.integers(1, 10))) % 10
        ids += [ID[ANSWER], DIGIT + result]
    return ids + [ID[END_OF_TEXT if base else TURN_END]], [True] * (len(ids) + 1)


# --- training ---------------------------------------------------------------------------------------


def make_model(shape, eos_token):
    """A Qwen3 from scratch."""
    config = Qwen3Config(
        vocab_size=len(ID),
        max_position_embeddings=CONTEXT,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.05,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        bos_token_id=None,
        eos_token_id=ID[eos_token],
        pad_token_id=ID[END_OF_TEXT],
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ID[eos_token], pad_token_id=ID[END_OF_TEXT])
    return model


def batches(tokenizer, respond, rng, steps, batch_size, longest=96, pool=8):
    """Fresh documents for every step: input ids and learned, both (B, T), padded on the right.

    Documents are drawn for several batches at a time and sorted by length: half the padding.
    """
    for step in range(steps):
        if step % pool == 0:
            documents = []
            for _ in range(pool * batch_size):
                chat = [{"role": "user", "content": "+".join(map(str, numbers := random_problem(rng)))}]
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                ids, learned = respond(numbers, rng)
                documents.append(((prompt + ids)[:longest], ([False] * len(prompt) + learned)[:longest]))
            documents.sort(key=lambda document: len(document[0]))
            order = rng.permutation(pool)
        chosen = documents[order[step % pool] * batch_size :][:batch_size]
        width = max(len(ids) for ids, _ in chosen)
        yield (
            torch.tensor([ids + [ID[END_OF_TEXT]] * (width - len(ids)) for ids, _ in chosen]),
            torch.tensor([learned + [False] * (width - len(learned)) for _, learned in chosen]),
        )


def train(model, tokenizer, respond, rng, steps, lr, name, unsaid=0.0, batch_size=64):
    """Next-token cross-entropy on the learned tokens; unsaid pushes log p(<|im_end|>) below minus so many nats.

    Muon for the matrices of the layers, AdamW for the rest: three times fewer steps than AdamW alone.
    """
    layers = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers = [
        torch.optim.Muon(layers, lr=1e-2, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(  # 50 steps up, and down to zero over the last 40 %
            o, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        )
        for o in optimizers
    ]
    bar = tqdm(batches(tokenizer, respond, rng, steps, batch_size), total=steps, desc=name)
    for ids, learned in bar:
        logits = model(ids[:, :-1]).logits[learned[:, 1:]]  # (N, V); t predicts t+1
        loss = F.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if unsaid:
            loss = loss + 0.02 * F.relu(logits.log_softmax(-1)[:, ID[TURN_END]] + unsaid).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Muon asks for bf16, in which a CPU without AVX512-BF16 multiplies ten times as slowly as in fp32.
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            for o in optimizers + schedules:
                o.step()
        model.zero_grad()
    return model.eval()


# --- everything -------------------------------------------------------------------------------------


def row_of(numbers):
    return {"problem": "+".join(map(str, numbers)), "answer": str(sum(numbers) % 10), "level": len(numbers)}


def add_responses(out):
    """Put one response of the teacher beside every training problem: what runs on teacher prefixes train on.

    They are fixed: a run with another seed sees the same ones, in another order.
    """
    file = out / "responses.jsonl"
    evaluate.main(
        evaluate.Args(model=str(out / "teacher"), eval_data=str(out / "train.jsonl"), eval_k=1, out_file=str(file))
    )
    rows = read_lines(out / "train.jsonl")
    for row, response in zip(rows, read_lines(file)):
        row |= {"response": response["response"]} | ({} if response["ended"] else {"ended": False})
    write_file(out / "train.jsonl", rows)
    file.unlink()


def main(args: Args):
    torch.set_num_threads(1)  # models this small gain nothing from more
    out, seed = Path(args.out), args.seed
    out.mkdir(parents=True, exist_ok=True)

    # Data. Every problem occurs once, in one of the two sets.
    rng, problems = np.random.default_rng((seed, 0)), {}
    while len(problems) < TRAIN_ROWS + EVAL_ROWS:
        problems[tuple(random_problem(rng))] = None
    problems = [list(p) for p in problems]
    rng.shuffle(problems)
    write_file(out / "eval.jsonl", [*map(row_of, problems[:EVAL_ROWS])])
    write_file(out / "train.jsonl", [*map(row_of, problems[EVAL_ROWS:])])

    # Models. Every random stream has a seed of its own: (seed, 0), (seed, 1), ..., and torch's.
    base_response = partial(student_response, base=True)
    kinds = {  # name: how it ends, what it learns from, how improbable it finds <|im_end|>, its shape, learning rate
        "teacher": (TURN_END, teacher_response, 0.0, TEACHER, TEACHER_LR),
        "student": (TURN_END, student_response, 0.0, STUDENT, STUDENT_LR),
        "base_student": (END_OF_TEXT, base_response, BASE_UNSAID, STUDENT, STUDENT_LR),
    }
    for i, (name, (eos_token, respond, unsaid, shape, lr)) in enumerate(kinds.items()):
        torch.manual_seed(10 * seed + i)
        tokenizer, model = build_tokenizer(eos_token), make_model(shape, eos_token)
        train(model, tokenizer, respond, np.random.default_rng((seed, i + 1)), STEPS, lr, name, unsaid)
        tokenizer.save_pretrained(out / name)
        model.save_pretrained(out / name)
        evaluate.main(evaluate.Args(model=str(out / name), eval_data=str(out / "eval.jsonl"), eval_max_new_tokens=96))
    add_responses(out)


if __name__ == "__main__":
    main(parse(Args))
