"""Split shards by parent instead of by slide: every k-th bag of each shard is held out, the rest trains.

    python dev/heldout.py bags/all bags --every 4      # -> bags/train and bags/test

For one question only: which slide does a held-out parent come from? For anything else split by slide or patient.
"""
import argparse
import sys
import tarfile
from pathlib import Path


def split(source, out, every):
    """Copy bags-*.tar of `source` to out/train and out/test, bag by bag -> number of bags in each."""
    shards = sorted(Path(source).glob("bags-*.tar"))
    if not shards:
        raise ValueError(f"{source} holds no bags-*.tar: make them with `python data.py tile SLIDES --out {source}`")
    count = {"train": 0, "test": 0}
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()  # KEY.jpg, KEY.json, KEY.jpg, ...
            for part in count:
                chosen = [(i, m) for i, m in enumerate(members) if (i // 2 % every == every - 1) == (part == "test")]
                if chosen:
                    (Path(out) / part).mkdir(parents=True, exist_ok=True)
                    with tarfile.open(Path(out) / part / shard.name, "w") as copy:
                        for _, m in chosen:
                            copy.addfile(m, tar.extractfile(m))
                    count[part] += len(chosen) // 2
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--every", type=int, default=4, help="hold out each k-th bag of a shard (4)")
    args = parser.parse_args()
    try:
        print(split(args.source, args.out, args.every))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
