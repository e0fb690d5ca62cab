"""Where the time of a step goes on a CPU, operator by operator: one step of a real run of any script, profiled.

    python bench/operators.py opd --recipe recipes/laptop.txt --eval_data none --steps 3 --out_dir runs/operators

All but the first word are the script's own arguments. The last step but one is profiled: the first ones set things up,
and the last one is followed by saving. So give at least two steps, and an --out_dir that is not finished. Printed:
operators that take more than 1 % of the step, and on which shapes.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.profiler import ProfilerActivity, profile

from plumbing.runs import Run, parse


def profiled(steps):
    """Run.steps, with a profile of the last step but one."""

    def steps_and_a_profile(run):
        for step in steps(run):
            if step != run.args.steps - 1:
                yield step
                continue
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                yield step
            report(profiler)

    return steps_and_a_profile


def report(profiler):
    operators, by_shape = profiler.key_averages(), profiler.key_averages(group_by_input_shape=True)
    total = sum(operator.self_cpu_time_total for operator in operators)
    print(f"\n{total / 1e6:.1f} s in all\n")
    print("| operator | share | the largest parts: share, calls, shapes |\n|---|---|---|")
    for operator in sorted(operators, key=lambda x: -x.self_cpu_time_total):
        if (share := operator.self_cpu_time_total / total) > 0.01:
            parts = sorted((x for x in by_shape if x.key == operator.key), key=lambda x: -x.self_cpu_time_total)[:3]
            cells = [f"{x.self_cpu_time_total / total:.1%} {x.count} × {[s for s in x.input_shapes if s]}" for x in parts]
            print(f"| `{operator.key}` | {share:.1%} | {'; '.join(cells)} |")


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    Run.steps = profiled(Run.steps)
    script.main(parse(script.Args, sys.argv[2:]))
