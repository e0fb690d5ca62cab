"""Five copies of opd.py, each with one silent fault: it runs to its end and says nothing. Find it by its log alone.

    python docs/bug_hunt.py 1               run number 1 on the toy, into runs/bug_1 (half a minute)
    python opd.py                           a healthy run, to compare it with
    python docs/bug_hunt.py 1 --reveal      the fault, as a diff

Look at the lines of runs/bug_1/log.jsonl beside those of runs/opd/log.jsonl: loss, entropy, grad_norm, lr, step by
step, and the evaluations. Arguments after the number go to the script: another learning rate needs another --out_dir.
"""

import codecs
import difflib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Old and new line, in rot13, so that nobody finds a fault before looking for it.
FAULTS = [
    ("netf.ye * zva(1.0, (fgrc + 1) / znk(1, netf.jnezhc_fgrcf))",
     "netf.ye * (fgrc + 1) / znk(1, netf.jnezhc_fgrcf)"),
    ('ongpu(fgrc), frrq_bs(netf.frrq, "ebyybhgf", fgrc)', 'ongpu(0), frrq_bs(netf.frrq, "ebyybhgf", 0)'),
    ("bcgvzvmre.mreb_tenq()", "cnff"),
    ("ybnq_grnpure(netf)", "ybnq_fghqrag(netf)[0]"),
    ("zvpeb.znfx / a_gbxraf", "zvpeb.znfx * 1.0"),
]  # fmt: skip


def faulty(n):
    """-> opd.py as it is, and with fault number n."""
    healthy = (ROOT / "opd.py").read_text(encoding="utf-8")
    old, new = (codecs.decode(line, "rot13") for line in FAULTS[n - 1])
    if healthy.count(old) != 1:
        raise SystemExit(f"error: opd.py has been changed, and fault {n} has no place in it any more")
    return healthy, healthy.replace(old, new)


def main(argv):
    numbers = [str(i + 1) for i in range(len(FAULTS))]
    if not argv or argv[0] not in numbers:
        raise SystemExit(f"error: which one? python docs/bug_hunt.py {'|'.join(numbers)} [--reveal]")
    healthy, sick = faulty(int(argv[0]))
    if "--reveal" in argv:
        lines = difflib.unified_diff(healthy.split("\n"), sick.split("\n"), "opd.py", "with the fault", "", "", 0, "")
        print("\n".join(lines))
        return 0
    script = ROOT / "runs" / "bugs" / f"bug_{argv[0]}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(sick, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.call([sys.executable, str(script), *argv[1:]], env=os.environ | {"PYTHONPATH": paths})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
