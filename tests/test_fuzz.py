"Damaged and odd inputs of every kind: refused with a sentence, or answered rightly. By hand: `python -m tests.fuzz 3000 SEED`."
import pytest

from tests.fuzz import KINDS, run


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_traceback_crash_hang_or_silent_error(kind):
    counts, bad = run(22, 0, [kind])
    assert sum(counts.values()) == 22
    assert not bad, "\n".join(bad)
