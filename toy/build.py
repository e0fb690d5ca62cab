"""Build the embedded default: two tiny chat models, a training set and an evaluation set.

    python toy/build.py --out toy         # from nothing, seed 0; 5 minutes of one CPU core

This is data, not a method: the scripts read what stands in this folder as they would read
Qwen3 checkpoints and GSM8K. Nobody needs to run this file; it is here so that nothing is hidden.

THE WORLD. A problem is a sum of 3 to 5 digits modulo 10. A solution is a line of equations: in
each step one adjacent pair, any one, is added up. One line proves little, so the solver writes
another one, with its own choices, and answers as soon as a line agrees with an earlier one:

    user        3+8+5+7
    assistant   =1+5+7=1+2=3
                =3+8+2=1+2=3
                ####3<|im_end|>

What each part is for:

  * MANY WAYS. Any pair may be added first, so a problem with 5 numbers has 24 ways to write a line.
    The teacher is uncertain and right at the same time, and the two KL directions have something to
    disagree about: cover all the ways, or settle on a few.
  * LENGTH. A line has 3 to 10 tokens, and there are two or more: a short training length sees only
    the beginning.
  * RECOVERY. A teacher that is almost always right almost always writes two lines that agree. So in
    its own text, the teacher prefixes, "answer when two lines agree" looks like "answer after two
    lines". Only a student's text shows the difference: there, lines often disagree, and the teacher
    asks for a third. It knows what to do after mistakes because it was trained on lines with wrong
    digits put in; these digits are masked from the loss, so it did not learn to make them.
  * ENDING. The teacher ends with <|im_end|>, as a chat model does. Now and then it says its answer
    once more before that, and whoever repeats himself tends to go on: the more often the answer
    stands there already, the more likely the teacher is to say it again, as language models do.
    The student is a base model: after its answer it stops with <|endoftext|>, or runs straight on
    into another problem. It hardly ever says <|im_end|>, and the teacher never says <|endoftext|>.
  * SMALL AND SLOPPY. The student is smaller than the teacher, and has learned, not for long, from
    text with many wrong digits and two or more lines whether they agree or not.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# --- vocabulary -----------------------------------------------------------------------------------
# As in a byte-pair vocabulary, frequent neighbours are one token: "5", "+5", "=5", and "=5\n", which
# is the result of a line: that lines agree shows in two equal tokens.

END_OF_TEXT, TURN_START, TURN_END, ANSWER = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "####"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END, "<|unk|>"]
WORDS = ["user", "assistant", "\n", ANSWER] + [f % d for f in ("%d", "+%d", "=%d", "=%d\n") for d in range(10)]
ID = {token: i for i, token in enumerate(SPECIAL + WORDS)}
DIGIT, PLUS, EQUALS, RESULT = ID["0"], ID["+0"], ID["=0"], ID["=0\n"]     # "+5" is PLUS + 5

CHAT_TEMPLATE = (       # ChatML, as in Qwen
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# --- settings: tuned once, see the README for what they lead to -------------------------------------

TRAIN_ROWS, EVAL_ROWS = 4096, 128
LEVELS = (3, 4, 5)              # numbers in a sum
CONTEXT = 256                   # tokens
MAX_LINES = 5                   # the teacher gives up looking for agreement after this many

TEACHER = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=4, head_dim=24, tie_word_embeddings=False)
TEACHER_STEPS, TEACHER_LR = 2000, 2e-3
SABOTAGE = 0.5                  # fraction of the teacher's documents with mistakes put in ...
SABOTAGE_RATE = 0.25            # ... and how many of their steps are hit
RESTATE = (0.025, 0.5, 0.9, 0.97)   # how likely the teacher says its answer again, after 0, 1, 2, 3+ repetitions
LOOPS = 0.08                    # documents with repetitions put in, masked: the teacher hardly shows them itself
TEACHER_RUN_ON = 0.08           # documents that run on: the teacher must know what to do with such a prefix

STUDENT = dict(hidden_size=48, intermediate_size=144, num_hidden_layers=2, num_attention_heads=3,
               num_key_value_heads=3, head_dim=16, tie_word_embeddings=True)
STUDENT_STEPS, STUDENT_LR = 700, 2e-3
STUDENT_NOISE = 0.25            # wrong digits per step in the text that the student has learned from
STUDENT_ANSWERS = 0.5           # after two lines or more: answer, whatever the lines say, or write another
STUDENT_STOPS = 0.7             # after an answer: <|endoftext|>, or run on into another problem ...
STUDENT_CHATS = 0.001           # ... or, in the rare chat transcript on the web, <|im_end|>


def build_tokenizer(eos_token):
    """The same vocabulary for both models; they differ in how they end, as chat and base models do."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|user|assistant|=[0-9]\n|[+=]?[0-9]|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()               # put tokens together without spaces
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token=END_OF_TEXT,
                                   unk_token="<|unk|>", clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
                                   additional_special_tokens=SPECIAL[1:3], padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- documents: lists of ids, and which of them are learned -----------------------------------------


def random_problem(rng):
    """3 to 5 digits, each length equally often (less so in the data, where no problem occurs twice)."""
    return rng.integers(0, 10, size=rng.choice(LEVELS)).tolist()


def problem_ids(numbers):
    return [DIGIT + numbers[0]] + [PLUS + n for n in numbers[1:]]


def prompt_ids(numbers):
    """What the chat template makes of a problem (main checks that it does)."""
    return ([ID[TURN_START], ID["user"], ID["\n"]] + problem_ids(numbers) + [ID[TURN_END], ID["\n"]]
            + [ID[TURN_START], ID["assistant"], ID["\n"]])


def write_line(numbers, rng, mistakes):
    """One line of equations. Returns ids, whether each is right, and the result.

    A mistake is a wrong digit, now and then a number lost or one too many. What follows it goes on
    from there, correctly: mistakes are never repaired within a line.
    """
    ids, right = [], []
    while len(numbers) > 1:
        i = rng.integers(len(numbers) - 1)
        numbers = numbers[:i] + [(numbers[i] + numbers[i + 1]) % 10] + numbers[i + 2:]
        wrong = None
        if rng.random() < mistakes:
            wrong, kind = rng.integers(len(numbers)), rng.random()
            if kind < 0.1 and wrong < len(numbers) - 1:
                del numbers[wrong]
            elif kind < 0.2 and len(numbers) < max(LEVELS):
                numbers.insert(wrong, int(rng.integers(10)))
            else:
                numbers[wrong] = (numbers[wrong] + int(rng.integers(1, 10))) % 10
        first = EQUALS if len(numbers) > 1 else RESULT
        ids += [(PLUS if j else first) + n for j, n in enumerate(numbers)]
        right += [j != wrong for j in range(len(numbers))]
    return ids, right, numbers[0]


def teacher_response(numbers, rng, run_on=TEACHER_RUN_ON):
    """Lines until one agrees with an earlier one, the answer, the ending. Returns ids and learned."""
    ids, learned, results = [], [], []
    mistakes = SABOTAGE_RATE if rng.random() < SABOTAGE else 0.0
    while len(results) == len(set(results)) and len(results) < MAX_LINES:
        line, right, result = write_line(numbers, rng, mistakes if len(results) < 3 else 0.0)
        ids, learned = ids + line, learned + right
        results.append(result)
    ids, learned = ids + [ID[ANSWER], DIGIT + results[-1]], learned + [True, True]
    said, put_in = 0, rng.integers(1, 7) if rng.random() < LOOPS else 0
    while said < put_in or rng.random() < RESTATE[min(said, 3)]:
        ids, learned = ids + [ID["\n"], ID[ANSWER], DIGIT + results[-1]], learned + [said >= put_in, True, True]
        said += 1
    if rng.random() >= run_on:
        return ids + [ID[TURN_END]], learned + [True]
    # Not the teacher's idea (masked), but if somebody runs on into another problem, it solves that.
    other = random_problem(rng)
    more, more_learned = teacher_response(other, rng, run_on=0.0)
    other = [ID["\n"]] + problem_ids(other)
    return ids + other + more, learned + [False] * len(other) + more_learned


def student_response(numbers, rng, longest=48):
    """Sloppy lines, two or as many more as chance will have, an answer, and the end or another problem."""
    ids, lines = [], 0
    while lines < 2 or rng.random() >= STUDENT_ANSWERS:
        line, _, result = write_line(numbers, rng, STUDENT_NOISE)
        ids, lines = ids + line, lines + 1
    ids += [ID[ANSWER], DIGIT + result]
    if rng.random() < STUDENT_CHATS:
        ids += [ID[TURN_END]]
    elif rng.random() < STUDENT_STOPS or len(ids) > longest:
        ids += [ID[END_OF_TEXT]]
    else:
        other = random_problem(rng)
        ids += [ID["\n"]] + problem_ids(other) + student_response(other, rng, longest - len(ids))[0]
    return ids, [True] * len(ids)


# --- training ---------------------------------------------------------------------------------------


def make_model(shape, eos_token):
    """A Qwen3 from scratch."""
    config = Qwen3Config(vocab_size=len(ID), max_position_embeddings=CONTEXT, initializer_range=0.05,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0),
                         bos_token_id=None, eos_token_id=ID[eos_token], pad_token_id=ID[END_OF_TEXT], **shape)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ID[eos_token],
                                               pad_token_id=ID[END_OF_TEXT])
    return model


def batches(respond, rng, steps, batch_size, longest=96, pool=8):
    """Fresh documents for every step: input ids and learned, both (B, T), padded on the right.

    Documents are drawn for several batches at a time and sorted by length: half the padding.
    """
    for step in range(steps):
        if step % pool == 0:
            documents = []
            for _ in range(pool * batch_size):
                prompt = prompt_ids(numbers := random_problem(rng))
                ids, learned = respond(numbers, rng)
                documents.append(((prompt + ids)[:longest], ([False] * len(prompt) + learned)[:longest]))
            documents.sort(key=lambda document: len(document[0]))
            order = rng.permutation(pool)
        chosen = documents[order[step % pool] * batch_size:][:batch_size]
        width = max(len(ids) for ids, _ in chosen)
        yield (torch.tensor([ids + [ID[END_OF_TEXT]] * (width - len(ids)) for ids, _ in chosen]),
               torch.tensor([learned + [False] * (width - len(learned)) for _, learned in chosen]))


def train(model, respond, rng, steps, lr, name, batch_size=64):
    """Next-token cross-entropy on the learned tokens.

    Muon for the matrices of the layers, AdamW for the rest: three times fewer steps than AdamW alone.
    """
    layers = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers = [torch.optim.Muon(layers, lr=5 * lr, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(   # 50 steps up, and down to zero over the last 40 %
        o, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))) for o in optimizers]
    bar = tqdm(batches(respond, rng, steps, batch_size), total=steps, desc=name)
    for ids, learned in bar:
        logits = model(ids[:, :-1]).logits                        # (B, T-1, V); t predicts t+1
        loss = F.cross_entropy(logits[learned[:, 1:]], ids[:, 1:][learned[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers + schedules:
            o.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


# --- measuring --------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, problems, max_new_tokens, generator):
    """One response per problem at T = 1. Returns ids, mask, entropy, each (B, T); the mask includes the end."""
    prompts = [prompt_ids(numbers) for numbers in problems]
    width = max(map(len, prompts))
    ids = torch.tensor([[ID[END_OF_TEXT]] * (width - len(p)) + p for p in prompts])        # padded on the left
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    position = (attention.cumsum(1) - 1).clamp(min=0)
    cache, alive, columns = DynamicCache(), torch.ones(len(prompts), dtype=torch.bool), []
    for _ in range(max_new_tokens):
        logits = model(ids, attention_mask=attention, position_ids=position, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]                     # (B, V)
        log_p = logits.log_softmax(-1)
        ids = torch.multinomial(log_p.exp(), 1, generator=generator)                       # (B, 1)
        columns.append((ids[:, 0], alive, -(log_p.exp() * log_p).sum(-1)))
        alive = alive & (ids[:, 0] != ID[TURN_END]) & (ids[:, 0] != ID[END_OF_TEXT])
        if not alive.any():
            break
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
        position = position[:, -1:] + 1
    return [torch.stack(column, 1) for column in zip(*columns)]


def measure(model, problems, k=8, max_new_tokens=64, seed=0):
    """Accuracy, length, entropy and how responses end, from k responses per problem at T = 1."""
    repeated = [numbers for numbers in problems for _ in range(k)]
    ids, mask, entropy = sample(model, repeated, max_new_tokens, torch.Generator().manual_seed(seed))
    responses = [row[alive].tolist() for row, alive in zip(ids, mask)]
    correct = []
    for numbers, response in zip(repeated, responses):            # the last answer counts
        given = [after for token, after in zip(response, response[1:]) if token == ID[ANSWER]]
        correct.append(given[-1:] == [DIGIT + sum(numbers) % 10])
    correct = np.array(correct).reshape(len(problems), k)
    last = [response[-1] for response in responses]
    return {"Avg@8": correct.mean(), "Pass@8": correct.any(1).mean(),
            "entropy": (entropy * mask).sum().item() / mask.sum().item(), "length": mask.sum(1).float().mean().item(),
            "clipped": np.mean([t not in (ID[TURN_END], ID[END_OF_TEXT]) for t in last]),
            **{token: np.mean([t == ID[token] for t in last]) for token in (TURN_END, END_OF_TEXT)}}, responses


# --- everything -------------------------------------------------------------------------------------


def write_rows(path, problems):
    with open(path, "w") as file:
        for numbers in problems:
            row = {"problem": "+".join(map(str, numbers)), "answer": str(sum(numbers) % 10), "level": len(numbers)}
            file.write(json.dumps(row) + "\n")


def main(out, seed):
    torch.set_num_threads(1)                    # models this small gain nothing from more
    start, out = time.time(), Path(out)
    out.mkdir(parents=True, exist_ok=True)

    # Data. Every problem occurs once, in one of the two sets.
    rng, problems = np.random.default_rng(seed), {}
    while len(problems) < TRAIN_ROWS + EVAL_ROWS:
        problems[tuple(random_problem(rng))] = None
    problems = [list(p) for p in problems]
    rng.shuffle(problems)
    held_out = problems[:EVAL_ROWS]
    write_rows(out / "eval.jsonl", held_out)
    write_rows(out / "train.jsonl", problems[EVAL_ROWS:])

    # Models.
    for i, (name, shape, respond, steps, lr, eos_token) in enumerate([
            ("teacher", TEACHER, teacher_response, TEACHER_STEPS, TEACHER_LR, TURN_END),
            ("student", STUDENT, student_response, STUDENT_STEPS, STUDENT_LR, END_OF_TEXT)]):
        torch.manual_seed(seed + i)
        tokenizer, model = build_tokenizer(eos_token), make_model(shape, eos_token)
        model = train(model, respond, np.random.default_rng([seed, i]), steps, lr, name)
        tokenizer.save_pretrained(out / name)
        model.save_pretrained(out / name)

        numbers = held_out[0]
        text = [{"role": "user", "content": "+".join(map(str, numbers))}]
        assert tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False) == prompt_ids(numbers)
        results, responses = measure(model, held_out)
        print(f"\n{name}: {model.num_parameters():,} parameters, " + ", ".join(f"{k} {v:.3f}" for k, v in results.items()))
        print("\n".join(f"{'+'.join(map(str, held_out[j]))}\n{tokenizer.decode(responses[8 * j])}" for j in range(3)))
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the two toy models and the toy data.")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="for data, weights and documents")
    args = parser.parse_args()
    main(args.out, args.seed)
