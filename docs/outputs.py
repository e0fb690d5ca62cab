"""Run every command of lesson.md, in order and in a fresh copy, and keep the last lines of each in outputs.json.

    python docs/outputs.py      ten minutes on two CPU cores

The numbers of answers.md are read off there, section by section, and a test looks for them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commands():
    """-> [(section of the lesson, command)]. A block that says `python -c` is one command."""
    for section in re.split(r"^## ", (ROOT / "docs/lesson.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S):
            for command in [block] if "python -c" in block else block.splitlines():
                yield section.splitlines()[0], command


def main():
    found, environment = {}, os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, Path(folder) / "copy", ignore=shutil.ignore_patterns("runs", ".*"))
        for section, command in commands():
            print(command, flush=True)
            done = subprocess.run(command, shell=True, cwd=copy, env=environment, stdout=subprocess.PIPE, check=True)
            lines = re.sub("\033\\[[\\d;]*m", "", done.stdout.decode()).splitlines()
            found.setdefault(section, {})[command] = [line.rstrip() for line in lines[-40:]]
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "docs/outputs.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
