"Damaged and odd inputs of every kind: refused with a sentence, or answered rightly. By hand: `python -m tests.fuzz 3000 SEED`."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = ast.parse((ROOT/"tests/fuzz.py").read_text(encoding="utf-8"))
KINDS = next(n.value.generators[0].iter.elts for n in TREE.body if isinstance(n, ast.Assign) and n.targets[0].id == "KINDS")


@pytest.mark.parametrize("kinds", [[k.id for k in KINDS[part::2]] for part in (0, 1)], ids=lambda kinds: kinds[0])
def test_no_traceback_crash_hang_or_silent_error(kinds):
    "In a process of its own, whose memory is not what other tests have claimed."
    n = 22*len(kinds)
    out = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", str(n), "0", *kinds], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0 and f"{n} cases" in out.stdout, out.stdout[-3000:] + out.stderr[-2000:]
