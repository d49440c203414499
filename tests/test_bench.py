"""Try dev/bench.py with small networks: pytest tests/test_bench.py"""

import re

from conftest import script


def test_every_stage_has_a_row_and_its_limit(world):
    done = script("dev.bench", "--tiny", "--paper", world, check=True)
    rows = dict(re.findall(r"(?m)^(.+?) +\| +\d+\.\d ms \| (\d+\.\d+) of [a-z]", done.stdout))
    names = "a bag from its shard|pyramid, flips, stain|vision, frozen|text: captions and keywords"
    names += "|fusion|heads of MRTVA|logits of words|ITC, ITM, PLM, CVTA, MRTVA|optimiser|tile"
    names += "|a whole step from pixels|a whole step from cached tokens|read a bag, one thread"
    names += "|keywords, textual bags|ids of captions|a batch of bags seen before"
    assert set(names.split("|")) <= set(rows), done.stdout
    # A wide margin, for the machine may be busy.
    assert all(0 <= float(share) < 3 for share in rows.values()), rows
    assert re.search(r"waiting for data +\| \d+\.\d% of the time", done.stdout)
    assert "failed" not in done.stdout


def test_an_unknown_stage_is_one_sentence():
    done = script("dev.bench", "stpe")
    assert done.returncode == 1
    assert done.stderr == "error: unknown stage stpe; there are step, data, text\n"
