"""Try dev/bench.py with small networks: pytest tests/test_bench.py"""

import re

from conftest import script


def test_every_stage_has_a_row_and_its_limit():
    done = script("dev.bench", "--tiny", check=True)
    rows = {}
    for line in done.stdout.splitlines():
        found = re.match(r"  (.+?) +(\d+\.\d) ms .*?(\d+\.\d\d) of (\w+)", line)
        if found:
            rows[found[1]] = float(found[3])
    names = "a bag from its shard|pyramid, flips, stain|vision, frozen|text: captions and keywords"
    names += "|fusion|heads of MRTVA|logits of words|ITC, ITM, PLM, CVTA, MRTVA|optimiser|tile"
    names += "|a whole step from pixels|a whole step from cached tokens|read a bag, one thread"
    names += "|keywords, textual bags|ids of captions|a whole batch of bags seen before"
    assert set(names.split("|")) <= set(rows)
    # A wide margin, for the machine may be busy.
    assert all(0 <= share < 3 for share in rows.values()), rows
    assert re.search(r"\d% of the time of 3 steps passed in waiting", done.stdout)


def test_an_unknown_stage_is_one_sentence():
    done = script("dev.bench", "stpe")
    assert done.returncode == 1
    assert done.stderr == "error: unknown stage stpe; there are step, data, text\n"
