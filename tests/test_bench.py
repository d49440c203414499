"""Try dev/bench.py with small networks: pytest tests/test_bench.py"""

import re

from conftest import Script, script


def test_every_stage_has_a_row_and_its_limit(world):
    # Two processes, for two cores.
    halves = (("step",), ("data", "text"))
    forks = [Script("dev.bench", *half, "--tiny", "--paper", world) for half in halves]
    parts = [fork.wait() for fork in forks]
    assert [part.returncode for part in parts] == [0, 0], parts
    said = "".join(part.stdout for part in parts)
    rows = dict(re.findall(r"(?m)^(.+?) +\| +\d+\.\d ms \| (\d+\.\d+) of [a-z]", said))
    names = "a bag from its shard|pyramid, flips, stain|vision, frozen|text: captions and keywords"
    names += "|fusion|heads of MRTVA|logits of words|ITC, ITM, PLM, CVTA, MRTVA|optimiser|tile"
    names += "|a whole step from pixels|a whole step from cached tokens|read a bag, one thread"
    names += "|keywords, textual bags|ids of captions|a batch of bags seen before"
    assert set(names.split("|")) <= set(rows), said
    # A wide margin, for the machine may be busy.
    assert all(0 <= float(share) < 3 for share in rows.values()), rows
    assert re.search(r"waiting for data +\| \d+\.\d% of the time", said)
    assert "failed" not in said


def test_an_unknown_stage_is_one_sentence():
    done = script("dev.bench", "stpe")
    assert done.returncode == 1
    assert done.stderr == "error: unknown stage stpe; there are step, data, text\n"
