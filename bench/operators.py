"""Where the time of a step goes, operator by operator: one step of a real run of any script, profiled.

    python bench/operators.py opd --recipe recipes/laptop.txt --eval_data none --steps 3 --out_dir runs/operators

All but the first word are the script's own arguments. The last step but one is profiled: the first ones set things up,
and the last one is followed by saving. Printed: operators that take more than 1 % of the step, and on which shapes.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import profile

from plumbing.runs import Run, parse


def profiled(steps):
    """Run.steps, with a profile of the last step but one."""

    def steps_and_a_profile(run):
        for step in steps(run):
            if step != run.args.steps - 1:
                yield step
                continue
            with profile(record_shapes=True) as profiler:
                yield step
            report(profiler)

    return steps_and_a_profile


def report(profiler):
    on = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators, by_shape = profiler.key_averages(), profiler.key_averages(group_by_input_shape=True)
    total = sum(getattr(operator, on) for operator in operators)
    print(f"\n{total / 1e6:.1f} s in all\n")
    print("| operator | share | the largest parts: share, calls, shapes |\n|---|---|---|")
    for operator in sorted(operators, key=lambda x: -getattr(x, on)):
        if (share := getattr(operator, on) / total) > 0.01:
            parts = sorted((x for x in by_shape if x.key == operator.key), key=lambda x: -getattr(x, on))[:3]
            cells = [f"{getattr(x, on) / total:.1%} {x.count} × {[s for s in x.input_shapes if s]}" for x in parts]
            print(f"| `{operator.key}` | {share:.1%} | {'; '.join(cells)} |")


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    Run.steps = profiled(Run.steps)
    script.main(parse(script.Args, sys.argv[2:]))
