"""Speed and memory of one on-policy reverse-KL step, side by side with TRL.

    ours    opd.py: its main(), on random prompts
    plain   the same with what one would write first: generate(), all logits of both models, KL by autograd
    trl     trl.DistillationTrainer.train() with beta=1, and without gradient checkpointing, as ours is

All do the same work on the same models and prompts, every second one of them half as long. No token ends a response.
Every contestant and repeat is a fresh process, in turn: one step to warm up, one or more that are timed, one whose
memory is measured. What counts is the fastest step and the median memory. On a CPU these are CPU-seconds, which other
programs disturb less, and the peak resident set above the one between two steps (Linux). On a GPU: wall time, and
torch's allocator. README.md lists the presets.
"""

import contextlib
import gc
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's runs in a thread of the process that is measured

import torch
import transformers

import opd
from common import make_rollouts
from plumbing import models
from plumbing.run import Batch, Run, parse, refuse, release_memory, start

GPU = torch.cuda.is_available()
SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
PRESETS = {  # student and teacher: see SHAPE; the rest in tokens and sequences
    "toy": dict(student=(128, 384, 2, 4, 2, 32), teacher=(256, 768, 4, 8, 4, 32), vocab=256, batch_size=16, steps=5),
    "real": dict(student=(64, 192, 2, 2, 1, 32), teacher=(128, 384, 2, 4, 2, 32)),
    "mid": dict(student=(256, 768, 4, 8, 4, 32), teacher=(512, 1536, 8, 16, 8, 32), tied=True, batch_size=4)
    | dict(prompt_len=64),
    "kl": dict(student=(64, 192, 0, 2, 1, 32), teacher=(128, 384, 0, 4, 2, 32), batch_size=16, max_new_tokens=256),
    "pair": dict(micro_batch_size=4, prompt_len=96),
    "h200": dict(student=(1024, 3072, 28, 16, 8, 128), teacher=(2560, 9728, 36, 32, 8, 128), tied=True, batch_size=32)
    | dict(prompt_len=128, max_new_tokens=1024, micro_batch_size=8),  # the published config.json of Qwen3-0.6B and 4B
}


@dataclass
class Args:
    preset: Literal[tuple(PRESETS)] = "toy"  # models and sizes
    student: str = ""  # of the preset pair: a checkpoint, a folder or a hub name
    teacher: str = ""  # likewise
    max_new_tokens: int = 0  # tokens of every response; 0: as the preset has it
    precision: Literal["fp32", "bf16"] = "bf16" if GPU else "fp32"  # bf16: all but the student's weights
    threads: int = 1  # CPU threads: ratios on a shared machine are steadier with one
    contestants: str = "ours,plain,trl" if find_spec("trl") else "ours,plain"  # separated by commas
    repeats: int = 3  # fresh processes per contestant


def case_of(preset, **given):
    """What is measured: the preset, but for what is given."""
    sizes = dict(vocab=151_936, tied=False, batch_size=8, prompt_len=32, max_new_tokens=64, steps=1)
    sizes |= PRESETS[preset] | {name: value for name, value in given.items() if value}
    if not {"student", "teacher"} <= sizes.keys():
        refuse(f"--preset {preset} needs --student and --teacher: checkpoints, each a folder or a hub name")
    case = SimpleNamespace(**dict(micro_batch_size=sizes["batch_size"], preset=preset) | sizes)
    case.vocab = min(model_config(name, case).vocab_size for name in (case.student, case.teacher))
    return case


def model_config(name, case):
    if isinstance(name, str):
        return transformers.AutoConfig.from_pretrained(name).get_text_config()
    more = dict(vocab_size=case.vocab, tie_word_embeddings=case.tied, initializer_range=name[0] ** -0.5)
    return transformers.Qwen3Config(**dict(zip(SHAPE, name)), **more)  # logits of order one


def load_model(case, original, name, precision):
    """In place of plumbing.models.load_model: random weights, if that is what the case has. Nothing ends a response."""
    if isinstance(name, tuple):
        torch.manual_seed(name[0])
        with models.device_here():  # billions of random numbers take minutes on a CPU
            model = transformers.Qwen3ForCausalLM(model_config(name, case)).requires_grad_(False).eval()
    model = models.cast(model, precision) if isinstance(name, tuple) else original(name, precision)
    model.config.get_text_config().eos_token_id = None
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # and no filters
    return model


def random_prompts(case, step):
    """Lists of token ids, every second one half as long: the same for every contestant. Never 0, the padding."""
    P, generator = case.prompt_len, torch.Generator().manual_seed(step)
    ids = torch.randint(1, case.vocab, (case.batch_size, P), generator=generator).tolist()
    return [row[: P // (1 + i % 2)] for i, row in enumerate(ids)]


class Clock:
    """Seconds of every step, those of its rollouts, and the peak memory of the last step."""

    def __init__(self, n_steps):
        self.n_steps, self.steps, self.peaks, self.rollout, self.began = n_steps, [], [], 0.0, self.now()

    def now(self):
        return (torch.cuda.synchronize() or time.perf_counter()) if GPU else time.process_time()

    @contextlib.contextmanager
    def rolling_out(self):
        began = self.now()
        yield
        self.rollout += self.now() - began

    def end_step(self, *args, **kwargs):
        self.steps.append((self.now() - self.began, self.rollout))
        if reset := len(self.steps) == self.n_steps - 1:
            gc.collect(), release_memory()  # what malloc keeps is not in use
        self.peaks.append(peak_memory(reset))
        self.rollout, self.began = 0.0, self.now()


def peak_memory(reset):
    """The most bytes in use since it was last asked to reset."""
    if GPU:
        return (torch.cuda.reset_peak_memory_stats() if reset else None) or torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs" if reset else os.devnull).write_text("5", encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


class RandomPrompts(Run):
    """What opd.py takes for its run: it neither evaluates nor writes."""

    def __init__(self, case, clock, args):
        self.case, self.clock, self.args, self.step, self.row, self.stopping = case, clock, args, 0, {}, False
        self.tokens, self.prompt_len = SimpleNamespace(end_ids=(), vocab_size=case.vocab), case.prompt_len
        self.batch = lambda step: Batch(random_prompts(case, step), *[None] * 4)

    def record(self, rollouts, *args, loss, **numbers):
        assert rollouts.mask.sum() == self.case.batch_size * self.case.max_new_tokens, "not the same work"
        super().record(rollouts, *args, loss=loss, **numbers)
        self.case.loss = loss
        self.clock.end_step()

    eval_is_due = save_is_due = resume = log = finish = lambda *_: False


def plain_sample(model, prompts, max_new_tokens, seed, **_):
    torch.manual_seed(seed)
    P = max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(prompt)) + prompt for prompt in prompts], device=model.device)
    options = dict(attention_mask=(ids > 0).long(), max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    responses = model.generate(ids, **options)[:, P:].tolist()
    return make_rollouts(prompts, responses, [False] * len(prompts), model.device)


def plain_loss(divergence, student, teacher, batch, token_weights, vocab_size, **_):
    logits = lambda model: model(batch.ids, use_cache=False).logits[:, :-1, :vocab_size][batch.mask[:, 1:]]  # (N, V)
    with torch.no_grad():
        log_p = logits(teacher).float().log_softmax(-1)
    with models.autocast(student):
        log_q = logits(student).float().log_softmax(-1)
    return (token_weights[batch.mask] * (log_q.exp() * (log_q - log_p)).sum(-1)).sum(), torch.zeros(())


def trl(case, clock, args):
    import tokenizers
    from trl import DistillationConfig, DistillationTrainer

    # It takes text, so here the words are the token ids. The end token is one past V: no response can end.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(case.vocab + 1)}, unk_token="0"))
    words.pre_tokenizer, end = tokenizers.pre_tokenizers.WhitespaceSplit(), str(case.vocab)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token="0")
    prompts = [" ".join(map(str, ids)) for step in range(args.steps) for ids in random_prompts(case, step)]
    config = DistillationConfig(
        output_dir="/tmp", save_strategy="no", report_to="none", disable_tqdm=True, beta=1.0, max_steps=args.steps,
        per_device_train_batch_size=case.micro_batch_size, shuffle_dataset=False, disable_dropout=True,
        gradient_accumulation_steps=case.batch_size // case.micro_batch_size, max_completion_length=case.max_new_tokens,
        gradient_checkpointing=False, learning_rate=args.lr, use_cpu=not GPU, bf16=case.precision == "bf16",
    )  # fmt: skip
    student, teacher, callback = models.load_student(args)[0], models.load_teacher(args), transformers.TrainerCallback()
    callback.on_step_end, student.generate = clock.end_step, clock.rolling_out()(student.generate)
    data, more = [{"prompt": prompt} for prompt in prompts], dict(processing_class=tokenizer, callbacks=[callback])
    case.loss = DistillationTrainer(student, teacher, config, data, **more).train().training_loss


def measure(contestant, case):
    """One contestant, once, in a process that does nothing else. -> (seconds, of them rollouts), MiB, loss"""
    start()
    torch.set_num_threads(case.threads)
    args = opd.Args(**{name: value for name, value in vars(case).items() if hasattr(opd.Args, name)})
    args.steps, args.lr, args.warmup_steps = case.steps + 2, 1e-7, 0  # all steps alike
    clock, parts = Clock(args.steps), dict(distillation_loss=plain_loss) if contestant == "plain" else {}
    parts["sample"] = clock.rolling_out()(plain_sample if contestant == "plain" else opd.sample)
    parts["Run"], load = partial(RandomPrompts, case, clock), partial(load_model, case, models.load_model)
    with mock.patch.object(models, "load_model", load), mock.patch.multiple(opd, **parts):
        trl(case, clock, args) if contestant == "trl" else opd.main(args)
    return min(clock.steps[1:-1]), (clock.peaks[-1] - clock.peaks[-2]) / 2**20, case.loss


def main(args):
    case, table = case_of(**vars(args)), {}
    rows = {name: [] for name in args.contestants.split(",")}
    for name in list(rows) * args.repeats:
        with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
            rows[name].append(pool.submit(measure, name, case).result())
    print(f"{case}\n\n| | rollout | rest | {'' if GPU else 'CPU-'}s | MiB | KL | time | memory |\n|" + "---|" * 8)
    for name, ((seconds, rollout), _, loss) in {name: min(rows[name]) for name in rows}.items():
        step, memory = seconds - rollout * (case.preset == "kl"), sorted(row[1] for row in rows[name])
        table[name] = rollout, seconds - rollout, step, memory[len(memory) // 2], loss
    for name, row in table.items():
        ratios = [row[i] / table.get("trl", row)[i] for i in (2, 3)]
        print(f"| {name} | " + " | ".join(f"{x:.3g}" for x in (*row, *ratios)) + " |")


if __name__ == "__main__":
    main(parse(Args))
