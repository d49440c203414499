"""Slides -> bags -> batches: everything between a slide file and the tensors a training step sees.

MR-PLIP (arXiv 2504.18856, section 3.1, multi-resolution data) reads one tissue region at 5x, 10x, 20x and 40x: a 5x patch
covers the same tissue as its 4 children at 10x, 16 at 20x and 64 at 40x, 1 + 4 + 16 + 64 = 85 patches: a *bag*. The paper
takes 20 such parents from each of 20,000 slides: 34 million patches of 512 x 512 pixels. Three ideas carry this file:

1. A bag is one square image. The 85 patches are its 2x2-average pyramid cut into tiles, so a bag is read once (each stored
   tile of the slide decoded once), kept as one JPEG, and augmented as one picture.
2. The 85 patches are a 4-ary heap in Z-order: the children of node n are 4n+1 .. 4n+4 (top-left, top-right, bottom-left,
   bottom-right). Kinship, position and mirror images are integer arithmetic on the node's number.
3. Magnification means microns per pixel, mpp = 10 / magnification; never the index of a pyramid level, which stands for
   something else in every file (40x, 10x, 2.5x from one scanner; 20x, 10x, 5x from another).

Slides are read by slide.py, which also knows the tree and chooses the parents. Outline: tiling into tar shards | BagDataset | pyramid
and augmentation | the command line. Shape letters: B bags, N nodes, S pixels per patch side. x, y, side are level-0 pixels of the slide.
"""
import argparse, contextlib, csv, difflib, fcntl, hashlib, io, json, multiprocessing, os, re, signal, sys, tarfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import imagecodecs, numpy as np, torch
from PIL import Image
from tqdm import tqdm

from slide import (LEVELS, MAGS, NODES, PICTURES, SUFFIXES, Slide, children, choose_parents, inspect, level, mpp_of, parent, place, preview,
                   resize, square, thumbnail, tissue_fraction, tissue_mask, valid_nodes)

# ---------------------------------------------------------------- tiling: slides -> tar shards

def find_slides(paths):
    """Files and folders (of slides, not searched deeper) -> paths sorted by file name, which must be unique. Beside slides a
    folder's PNG and JPEG files are thumbnails and the like; they are slides where there is nothing else."""
    found = set()
    for p in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not p.exists():
            raise ValueError(f"{p} does not exist: check the path")
        files = {kind: [f for f in p.iterdir() if f.suffix.lower() in kind] for kind in (SUFFIXES, PICTURES)} if p.is_dir() else {}
        inside = files[SUFFIXES] or files[PICTURES] if files else [p]
        if not inside:
            raise ValueError(f"{p} holds no slides ({' '.join(SUFFIXES + PICTURES)}): check the path")
        found.update(inside)
    found = sorted(found, key=lambda f: (f.name, str(f)))
    for a, b in zip(found, found[1:]):
        if a.name == b.name:
            raise ValueError(f"{a} and {b} share a name, and bags are known by it: rename one")
    return found

def mpp_table(mpp, names):
    """--mpp (None, a number, a dict, or a CSV file of slide,mpp lines) -> {slide name: mpp or None}."""
    try:
        return dict.fromkeys(names, mpp if mpp is None else float(mpp))
    except (TypeError, ValueError):
        if not isinstance(mpp, dict) and not Path(mpp).is_file():
            raise ValueError(f"--mpp {mpp} is neither a number nor a file: give microns per pixel or a CSV of slide,mpp") from None
    if isinstance(mpp, dict):
        return {n: mpp.get(n) for n in names}
    table = {}
    try:
        for i, row in enumerate(csv.reader(Path(mpp).read_text(encoding="utf-8-sig").splitlines()), 1):
            try:
                name, value = row
                table[name.strip()] = float(value)
            except ValueError:
                if row and not (i == 1 and len(row) == 2):                  # line 1 may be a heading
                    raise ValueError(f"{mpp}:{i}: expected slide,mpp and found {','.join(row)!r}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{mpp} is not a text file in UTF-8: save it as plain CSV") from None
    if not set(table) & set(names):
        raise ValueError(f"{mpp} names none of the slides (the first is {next(iter(names), None)}): give lines of file name,mpp")
    return {n: table.get(n) for n in names}

def check(**settings):
    """Refuse settings that cannot work, in one sentence."""
    for name, least, most in (("patch_px", 1, 4096), ("fov_px", 16, 65536), ("parents", 1, 10 ** 9), ("seed", 0, 2 ** 32), ("quality", 1, 100), ("min_tissue", 0, 1)):
        if name in settings and not least <= settings[name] <= most:
            raise ValueError(f"{name} is {settings[name]}, which is not between {least} and {most:g}: choose another value")

def _tile_slide(job):
    """Write one slide's shard and its row of slides.jsonl -> the row, or the sentence that says why not."""
    path, key, shard, mpp, threads, settings, boss = job
    if os.getpid() != boss and os.getppid() != boss:      # who asked was killed: the next run has begun this slide anew
        os._exit(1)
    temp = shard.with_suffix(f".tar.{os.getpid()}.tmp")
    try:
        with Slide(path, mpp, threads) as slide:
            bags = choose_parents(slide, *(settings[k] for k in ("fov_px", "parents", "min_tissue", "seed")))
            with tarfile.open(temp, "w") as tar:
                for i, (x, y, side, tissue) in enumerate(bags):
                    # 4:2:2: stain colour tells nucleus from cytoplasm, and the usual 4:2:0 quarters it
                    jpg = imagecodecs.jpeg8_encode(slide.read(x, y, side, 8 * settings["patch_px"]), settings["quality"], subsampling="422")
                    meta = dict(slide=slide.name, x=x, y=y, side=side, mpp=slide.mpp, levels=slide.mags,
                                tissue=[round(float(t), 4) for t in tissue])
                    for suffix, data in (("jpg", jpg), ("json", json.dumps(meta).encode())):
                        info = tarfile.TarInfo(f"{key}-{i:02d}.{suffix}")   # without time and user: same slide, same bytes
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        if bags:
            os.replace(temp, shard)
        row = dict(slide=slide.name, shard=shard.name, bags=len(bags), mpp=slide.mpp, doubt=slide.doubt, settings=settings)
        with open(shard.parent / "slides.jsonl", "a") as f:                 # after the shard: a row is a promise
            f.write(json.dumps(row) + "\n")
        return row
    except OSError as e:                                  # of the slide: our own sentence; of the shard: the system's, with a number
        return str(e) if e.errno is None else f"{path}: {shard} cannot be written or the slide not read ({e.strerror}): mend that, then repeat the command"
    except Exception as e:                                # one slide in ten thousand must not stop the others
        return str(e) if isinstance(e, ValueError) else f"{path} cannot be tiled ({type(e).__name__}: {e}): leave it out, or report this"
    finally:
        temp.unlink(missing_ok=True)

def _finished(out, mpps, settings):
    """Mend what a crash left in `out` -> the rows of slides.jsonl that hold, by slide. ValueError where `out` is for something else."""
    table, failures = out / "slides.jsonl", out / "failures.jsonl"
    rows = whole_rows(table, "slide", "shard", "bags", "mpp", "settings")
    if table.exists() and not table.read_bytes().endswith(b"\n"):           # the last row was cut off: the next starts a new line
        replace_file(table, "".join(json.dumps(row) + "\n" for row in rows))
    done = {row["slide"]: row for row in rows if not row["bags"] or (out / row["shard"]).exists()}
    for name, row in done.items():
        old, new = dict(row["settings"], mpp=row["mpp"]), dict(settings, mpp=mpps.get(name) or row["mpp"])
        if old != new:
            changed = ", ".join(f"{k} {old.get(k)} is now {new[k]}" for k in new if old.get(k) != new[k])
            raise ValueError(f"{out} holds {name} tiled with other settings ({changed}): repeat those or choose another --out")
    for stale in out.glob("bags-*.tar*.tmp"):
        stale.unlink()
    ours = {row["shard"] for row in done.values()}
    for shard in (s for s in sorted(out.glob("bags-*.tar")) if s.name not in ours):        # written, but killed before its row was
        try:
            with tarfile.open(shard) as tar:
                slide = next(json.loads(tar.extractfile(m).read())["slide"] for m in tar if m.name.endswith(".json"))
        except Exception:
            slide = None
        if slide not in mpps or slide in done:
            raise ValueError(f"{shard} is in no row of {table}, which this command would write anew: move it or choose another --out")
        shard.unlink()
    old = [row for row in whole_rows(failures, "slide", "reason") if row["slide"] not in mpps]             # the others are tried again
    replace_file(failures, "".join(json.dumps(row) + "\n" for row in old))
    return done

def tile(slides, out, patch_px=224, fov_px=512, parents=20, min_tissue=0.5, mpp=None, seed=0, workers=1, quality=90):
    """Slides (files or folders) -> one tar shard each in folder `out`, finished ones skipped: the same call continues a
    stopped one. fov_px: the paper's pixels per patch at its magnification, which sets the field of view. patch_px: the stored
    pixels per patch side, S, each bag an 8S x 8S JPEG. workers: processes, a slide each. A slide that cannot be used is left
    out, with a row {"slide", "reason"} in out/failures.jsonl, and tried again by the next call.
    -> dict(slides, done, bags, empty, failed): counts over the slides given."""
    paths, out = find_slides(slides), Path(out)
    mpps = mpp_table(mpp, [p.name for p in paths])
    settings = dict(patch_px=patch_px, fov_px=fov_px, parents=parents, min_tissue=min_tissue, seed=seed, quality=quality)
    check(**settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise ValueError(f"--out {out} cannot be written ({e.strerror}): choose another folder") from None
    with lock:                                            # held until closed, by us or by our end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another `data.py tile` is writing to {out}: wait for it, give it more --workers, or choose another --out") from None
        done = _finished(out, mpps, settings)
        # shard numbers go to slides in order of name before any work starts: neither workers nor interruptions change them
        taken, stems, jobs = {row["shard"] for row in done.values()}, {Path(name).stem for name in done}, []
        free = (shard for i in range(10 ** 6) if (shard := out / f"bags-{i:06d}.tar").name not in taken)
        for p in (p for p in paths if p.name not in done):
            key = re.sub(r"[^\w-]", "_", p.stem)          # no dot: tar readers group a bag's files by the name up to the first
            if key != p.stem or key in stems:             # then another slide may come to the same key
                key += "-" + hashlib.sha1(os.fsencode(p.name)).hexdigest()[:8]
            stems.add(p.stem)
            jobs.append((p, key, next(free), mpps[p.name], max(1, (os.cpu_count() or 1) // max(1, workers)), settings, os.getpid()))
        failed = _work(jobs, out, workers, len(paths))
    rows = {row["slide"]: row for row in whole_rows(out / "slides.jsonl", "slide", "bags") if row["slide"] in mpps}.values()
    return dict(slides=len(paths), done=len(rows), bags=sum(r["bags"] for r in rows), empty=sum(not r["bags"] for r in rows),
                failed=failed)

def _work(jobs, out, workers, total):
    """Do the jobs, in processes if there are several workers, with a progress bar -> how many failed."""
    pool, bar, failed = None, tqdm(total=total, initial=total - len(jobs), unit="slide", disable=None), 0
    say = lambda sentence: bar.write(sentence, file=sys.stderr)
    try:
        if workers > 1 and len(jobs) > 1:                 # spawn, because a fork of a process that has run torch may hang
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)          # workers inherit it and finish the slide in hand
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            results = pool.map(_tile_slide, jobs)
            signal.signal(signal.SIGINT, handler)
        for (path, *_, settings, _), row in zip(jobs, results if pool else map(_tile_slide, jobs)):
            bar.update()
            if isinstance(row, str):
                failed += 1
                say(f"left out: {row}")
                with contextlib.suppress(OSError), open(out / "failures.jsonl", "a") as f:   # a full disk takes no more words
                    f.write(json.dumps(dict(slide=path.name, reason=row)) + "\n")
            elif not row["bags"]:
                say(f"no parent: {path} has no square of {settings['fov_px']} pixels at 5x with {settings['min_tissue']:.0%} tissue")
            elif row["doubt"]:
                say(f"in doubt: {path}: {row['doubt']}; tiled with the former")
    except BrokenProcessPool:
        raise ValueError(f"a worker of {workers} was killed, most often because memory ran out: use fewer --workers; finished slides are kept") from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    return failed

def whole_rows(path, *keys):
    """The records of a JSON-lines file of ours that have `keys`, less any that a crash or a full disk cut off: what it told of is
    not done."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and all(k in row for k in keys) else []
    return rows

def replace_file(path, content):
    """Write bytes or text so that the file appears whole or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temp, path)

def save_png(image, path):
    """PIL image -> PNG, whole or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    replace_file(Path(path), content.getvalue())

def save_npz(path, arrays):
    """dict of arrays -> .npz, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(Path(path), content.getvalue())

# ---------------------------------------------------------------- bags as a dataset

def read_jsonl(path):
    """Yield (line number, byte offset, record) of a JSON-lines file; a broken line is a ValueError naming file:line."""
    offset = 0
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            try:
                if line.strip():
                    yield i, offset, json.loads(line)
            except ValueError as e:                       # of json, or of bytes that are not UTF-8
                raise ValueError(f"{path}:{i}: not JSON ({getattr(e, 'msg', e)}): mend or delete this line") from None
            offset += len(line)

class BagDataset(torch.utils.data.Dataset):
    """All bags of a folder of shards, in order of shard; ds[i] -> dict(key, slide, index, image uint8 [3,8S,8S], valid bool [85]).

    valid: see slide.valid_nodes. A bag is one JPEG, found by its offset, and so is each caption: nothing is loaded but what is asked for, in any order. Where things
    are is kept in `index.npz`, made when the folder is first opened, which also checks it: a truncated shard or a valid node
    without a caption is a ValueError naming the file. .keys, .slides [n] names, .shards paths and .shard_of [n] numbers into them, .S the patch side, .valid bool [n,85]."""

    def __init__(self, folder, captions=True, min_node=0.1):
        self.folder, self._truth = Path(folder), {}
        index = _index(self.folder, captions)
        self.shards = [self.folder / name for name in index["shards"].tolist()]
        self.keys, self.slides, self.S = index["keys"].tolist(), index["slides"].tolist(), int(index["S"])
        self.shard_of, self._spot, self._caption = index["shard"], index["spot"], index["caption"]
        there = valid_nodes(index["levels"], index["tissue"], min_node)
        self.valid = torch.from_numpy(there)
        if captions and (lack := there & (self._caption < 0)).any():
            i, n = np.argwhere(lack)[0]
            path = self.shards[self.shard_of[i]].with_suffix(".captions.jsonl")
            raise ValueError(f"{path} {'has no' if path.exists() else 'does not exist: no'} caption for node {n} of bag {self.keys[i]} "
                             f"({lack.sum()} missing in all): {_caption_remedy(self.folder)}")

    def jpeg(self, i):
        """The stored bytes of bag i."""
        return self._read(i, *self._spot[i, :2])

    def meta(self, i):
        """The json of bag i: slide, x, y, side, mpp, levels, tissue."""
        return json.loads(self._read(i, *self._spot[i, 2:]))

    def _read(self, i, offset, size):
        with open(self.shards[self.shard_of[i]], "rb") as f:                # opened anew: 10 us, no handle to share or run out of
            return os.pread(f.fileno(), size, offset)

    def captions(self, i, nodes=range(NODES)):
        """The captions of bag i, of all nodes or the `nodes` named: a list of str, None where there is none."""
        at = self._caption[i, list(nodes)].tolist()
        if max(at) < 0:
            return [None] * len(at)
        with open(self.shards[self.shard_of[i]].with_suffix(".captions.jsonl"), "rb") as f:
            return [json.loads(f.readline())["caption"] if a >= 0 and f.seek(a) >= 0 else None for a in at]

    def truth(self, i):
        """Ground truth of bag i from bags-*.truth.jsonl ({"key", "node", ...} a line): 85 of dict or None; None without a file."""
        path = self.shards[self.shard_of[i]].with_suffix(".truth.jsonl")
        if path not in self._truth:
            self._truth[path] = {}
            for _, _, r in read_jsonl(path) if path.exists() else ():
                self._truth[path].setdefault(r["key"], [None] * NODES)[r["node"]] = r
        return self._truth[path].get(self.keys[i])

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        try:
            image = torch.from_numpy(imagecodecs.jpeg8_decode(self.jpeg(i))).permute(2, 0, 1)
        except (RuntimeError, ValueError) as e:           # imagecodecs' own errors are RuntimeErrors
            raise ValueError(f"{self.shards[self.shard_of[i]]}: bag {self.keys[i]} is damaged ({e}): delete this shard and run `python data.py tile` again") from None
        return dict(key=self.keys[i], slide=self.slides[i], index=i, image=image, valid=self.valid[i])

def _caption_remedy(folder):
    return f"give each node one (`python text.py import CAPTIONS --shards {folder}`)"

def _index(folder, captions):
    """Where everything lies in a folder of n bags -> dict of arrays: shards, S, and for each bag keys, slides, shard [n], spot [n,4]
    (offset and size of its jpg, of its json), levels bool [n,4], tissue [n,85], caption [n,85] (offset of the
    line, -1 for none)."""
    shards, path = sorted(folder.glob("bags-*.tar")), folder / "index.npz"
    if not shards:
        raise ValueError(f"{folder} holds no bags-*.tar: make them with `python data.py tile SLIDES --out {folder}`")
    files = shards + [f for s in shards if captions and (f := s.with_suffix(".captions.jsonl")).exists()]
    stamp = json.dumps([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    try:
        with np.load(path) as index:
            if index["stamp"] == stamp:
                return dict(index)
    except Exception:                                     # none yet, or a damaged one, for which NumPy has many words: make it
        pass
    columns = {k: [] for k in ("keys", "slides", "shard", "spot", "levels", "tissue", "caption")}
    S = None
    for number, shard in enumerate(tqdm(shards, desc="index", unit="shard", disable=None, leave=False)):
        row, size = _index_shard(shard, number, captions)
        if size != 8 * (S or size // 8):
            raise ValueError(f"{shard} holds bags of {size} pixels, those before it {8 * S}: tile each size into its own folder")
        S = size // 8
        for k in columns:
            columns[k].append(row[k])
    index = dict({k: np.concatenate(v) for k, v in columns.items()}, shards=np.array([s.name for s in shards]), S=S, stamp=stamp)
    if captions:
        try:
            save_npz(path, index)
        except OSError:                                   # a folder that is only to be read: then it is made at each start
            pass
    return index

def _index_shard(shard, number, captions):
    """-> (the columns of `_index` for one shard, the side of its pictures). ValueError where it is not whole."""
    keys, slides, spots, levels, tissue = [], [], [], [], []
    try:
        with open(shard, "rb") as f, tarfile.open(fileobj=f) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    spots.append([member.offset_data, member.size])
                elif member.name.endswith(".json"):       # follows its jpg
                    meta = json.loads(tar.extractfile(member).read())
                    keys.append(member.name[:-5])
                    slides.append(meta["slide"])
                    spots[-1] += [member.offset_data, member.size]
                    levels.append([mag in meta["levels"] for mag in MAGS])
                    tissue.append(meta["tissue"])
            f.seek(-1024, os.SEEK_END)
            if f.read() != bytes(1024):
                raise ValueError("it does not end as a tar does")
            spot = np.array(spots, np.int64).reshape(-1, 4)                 # ValueError where a jpg or json stands alone
            columns = dict(keys=np.array(keys), slides=np.array(slides), shard=np.full(len(keys), number), spot=spot,
                           levels=np.array(levels).reshape(-1, len(MAGS)), tissue=np.array(tissue, np.float32).reshape(-1, NODES))
            if not len(keys) == len(set(keys)) == len(spot) == len(columns["tissue"]) > 0:
                raise ValueError("it does not hold bags of 85 nodes")
            f.seek(spot[0, 0])
            size = Image.open(io.BytesIO(f.read(spot[0, 1]))).width
    except (ValueError, TypeError, OSError, KeyError, IndexError, tarfile.TarError) as e:
        raise ValueError(f"{shard} is truncated or no shard of ours ({e}): delete it and run `python data.py tile` again") from None
    at = {k: np.full(NODES, -1, np.int64) for k in keys}
    path = shard.with_suffix(".captions.jsonl")
    for i, offset, r in read_jsonl(path) if captions and path.exists() else ():
        try:
            if type(r["node"]) is not int or not 0 <= r["node"] < NODES or not isinstance(r["caption"], str):
                raise KeyError
            if r["caption"] and r["key"] in at:           # of two captions of a node the last counts
                at[r["key"]][r["node"]] = offset
        except (KeyError, TypeError):
            raise ValueError(f'{path}:{i}: expected {{"key": ..., "node": 0-84, "caption": ...}}: {_caption_remedy(shard.parent)}') from None
    return dict(columns, caption=np.stack(list(at.values()))), size

# ---------------------------------------------------------------- pyramid and augmentation, on any device

def sample_nodes(B, b, generator=None, first=False):
    """A random b of the 4 children (or the `first` b) at every kept node -> LongTensor [B, N], N = 1 + b + b^2 + b^3.

    It is a b-ary heap of 4-ary node numbers: entry j's parent is entry (j-1)//b. Siblings are in rising order."""
    heap = [torch.zeros(B, 1, dtype=torch.long, device=generator.device if generator else "cpu")]
    for _ in range(3):
        shape, device = (*heap[-1].shape, 4), heap[-1].device
        lot = torch.arange(4.).expand(shape) if first else torch.rand(shape, generator=generator, device=device)
        heap.append((4 * heap[-1][..., None] + 1 + lot.argsort(-1)[..., :b].sort(-1).values).flatten(1))
    return torch.cat(heap, 1)

def levels(images):
    """images [B,3,8S,8S], uint8 or float in [0,1] -> the four magnifications, 5x first: [B,3,S,S], [B,3,2S,2S], [B,3,4S,4S], images.

    Each is the 2x2 *sum* of the next: sums of bytes are exact, 64 x 255 fits 16 bits, and they cost a quarter of floats. `cut` divides."""
    sums, wide = [images], images.dtype if images.is_floating_point() else torch.int16
    for _ in range(3):
        rows = sums[0][..., 0::2, :].to(wide) + sums[0][..., 1::2, :]
        sums.insert(0, rows[..., 0::2] + rows[..., 1::2])
    return sums

def cut(sums, b=4, nodes=None):
    """The `levels` of B bags -> patches float32 [B,N,3,S,S] in [0,1], in heap order, so that a parent is exactly the average of its children.

    `nodes` [B,N] from `sample_nodes` picks which to cut; without it, the first b children everywhere."""
    nodes = sample_nodes(1, b, first=True) if nodes is None else nodes
    # One row of nodes for all bags: slices will do, several times faster than an index per bag. Not where the host would wait for the numbers.
    same = len(nodes) == 1 and nodes.device.type == "cpu"
    b, (B, _, S, _), device = {4: 1, 15: 2, 40: 3, 85: 4}[nodes.shape[1]], sums[0].shape, sums[0].device
    bag, white = torch.arange(B, device=device)[:, None], 1 if sums[3].is_floating_point() else 255
    patches = torch.empty(B, nodes.shape[1], 3, S, S, device=device)
    parts = zip(*(x.split([b ** lev for lev in range(4)], 1) for x in (*place(nodes)[1:], patches)))     # rows, columns, patches by level
    for lev, (row, col, part) in enumerate(parts):        # [B, b^lev], [B, b^lev], [B, b^lev, 3, S, S]
        if same:
            for j, (r, c) in enumerate(zip(row[0].tolist(), col[0].tolist())):
                torch.div(sums[lev][..., r * S:r * S + S, c * S:c * S + S], white * 4 ** (3 - lev), out=part[:, j])
        else:
            grid = sums[lev].unflatten(3, (2 ** lev, S)).unflatten(2, (2 ** lev, S))         # [B, 3, rows, S, cols, S]
            part.copy_(grid[bag, :, row, :, col]).div_(white * 4 ** (3 - lev))
    return patches

def pyramid(images, b=4, nodes=None):
    """images [B,3,8S,8S], uint8 or float in [0,1] -> patches float32 [B,N,3,S,S] in [0,1]: `cut` of their `levels`."""
    return cut(levels(images), b, nodes)

def turn(patches, turns):
    """Turn or mirror all patches of a bag alike: [B, ..., S, S], turns [B] in 0..7 -> same shape. Histology has no right way up.

    Of a turn's bits, 4 transposes, then 1 mirrors left-right and 2 up-down: the 8 symmetries of the square. Turning every
    patch in its place is turning the bag as a whole and renaming its nodes; no loss depends on the names."""
    has = lambda bit: (turns & bit > 0).view(-1, *[1] * (patches.dim() - 1))
    patches = torch.where(has(4), patches.transpose(-1, -2), patches)
    patches = torch.where(has(1), patches.flip(-1), patches)
    return torch.where(has(2), patches.flip(-2), patches)

def zoom(images, window):
    """A square of each bag enlarged to the whole: uint8 [B,3,n,n], window [B,3] -> uint8 [B,3,n,n] (bilinear).

    window: side, top and left as shares of the bag. A square of share s makes 5x to 5x / s and 40x to 40x / s: magnifications
    between the four, which the paper names as its limitation. Nodes keep their captions: a small zoom shifts them a little."""
    side, top, left = window.to(images.device).float().unbind(1)
    zero = torch.zeros_like(side)                         # output -> input coordinates, both from -1 to 1
    theta = torch.stack([side, zero, 2 * left + side - 1, zero, side, 2 * top + side - 1], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, images.shape, align_corners=False)
    near = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return near.round_().clamp_(0, 255).to(torch.uint8)

# Ruifrok & Johnston 2001: optical density of haematoxylin, eosin and DAB (here a residual) in red, green and blue
HED = torch.nn.functional.normalize(torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]))
UNMIX = torch.linalg.inv(HED)  # here, because on a GPU an inverse waits for the device

def stain_jitter(patches, strength=0.05, lot=None):
    """Vary the staining, alike for all patches of a bag: float [B,...,3,H,W] in [0,1] -> the same (Tellez et al. 2018).

    Light is absorbed exponentially, so stains add up in optical density. There each stain gets a random gain 1 +- strength and
    offset +- strength, from lot [B,2,3] in [0,1) (drawn where not given): one 3 x 3 matrix and one vector per bag."""
    B, device = len(patches), patches.device
    lot = torch.rand(B, 2, 3, device=device) if lot is None else lot
    gain, offset = ((lot * 2 - 1) * strength).unbind(1)
    hed, unmix, one = HED.to(device, non_blocking=True), UNMIX.to(device, non_blocking=True), [1] * (patches.dim() - 4)    # or the host would wait for the GPU here
    matrix = hed.T @ ((1 + gain)[:, :, None] * unmix.T)                                # [B,3,3] density -> stains -> density
    light = patches.clamp(1 / 255, 1).log_()                                           # minus the density; in place: two passes over memory less
    light = (matrix.view(B, *one, 3, 3) @ light.flatten(-2)).view_as(patches) - (offset @ hed).view(B, *one, 3, 1, 1)
    return light.exp_().clamp_(max=1)

# ---------------------------------------------------------------- the command line

def main():
    """The command line; see `python data.py -h`. Exit code: the number of slides that cannot be used (at most 100)."""
    p = argparse.ArgumentParser(description="Slides -> bags of 85 patches at 5x, 10x, 20x and 40x.")
    sub = p.add_subparsers(dest="command", required=True)
    flags = (("--mpp", str, None, "level-0 microns per pixel, or a CSV of slide,mpp lines; default: what the file says", "itp"),
             ("--fov-px", int, 512, "patch side in pixels at its magnification: the field of view", "itp"),
             ("--parents", int, 20, "most 5x parents per slide", "tp"), ("--seed", int, 0, "which parents are drawn", "tp"),
             ("--min-tissue", float, 0.5, "least tissue share of a parent", "tp"),
             ("--patch-px", int, 224, "stored pixels per patch side: what the network sees", "t"),
             ("--workers", int, 1, "processes, a slide each", "t"), ("--quality", int, 90, "JPEG quality of a bag", "t"))
    for name, what in (("inspect", "what a slide holds"), ("tile", "slides -> tar shards"), ("preview", "a slide as a picture")):
        c = sub.add_parser(name, help=what, description=what, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.add_argument("slides", nargs=1 if name == "preview" else "+", metavar="SLIDE", help="file" + " or folder" * (name != "preview"))
        for flag, kind, default, text, where in flags:
            if name[0] in where:
                c.add_argument(flag, type=kind, default=default, help=text)
        if name != "inspect":
            c.add_argument("--out", required=True, help="folder of shards" if name == "tile" else "PNG to write")
    args, unknown = p.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], ["--out"] + [f[0] for f in flags], 1)
        p.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    a = vars(args)
    sys.stdout.reconfigure(errors="backslashreplace")     # a file's name may be no text at all
    command, paths, mpp = a.pop("command"), find_slides(a.pop("slides")), a.pop("mpp")
    check(**a)
    if command == "preview" and (len(paths) > 1 or Path(a["out"]).suffix.lower() != ".png" or not Path(a["out"]).absolute().parent.is_dir()):
        raise ValueError("preview draws one slide into one PNG: give a single SLIDE and --out NAME.png in a folder that exists")
    mpps, refused = mpp_table(mpp, [p.name for p in paths]), 0
    if command == "tile":
        n = tile(paths, mpp=mpps, **a)
        print(f"{n['bags']} bags from {n['done'] - n['empty']} of {n['slides']} slides in {a['out']}")
        refused = n["failed"]
    for path in paths if command != "tile" else ():
        try:
            brief = dict(brief=True) if command == "inspect" and len(paths) > 1 else {}
            (inspect if command == "inspect" else preview)(path, mpp=mpps[path.name], **a, **brief)
        except (ValueError, OSError) as e:
            refused += 1
            print(f"refused: {e}")
    if refused:
        print(f"error: {refused} of {len(paths)} slides cannot be used, see above" + (f" or {a['out']}/failures.jsonl" if command == "tile" else ""), file=sys.stderr)
        sys.exit(min(refused, 100))

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped: finished slides are kept, and the same command continues with the others", file=sys.stderr)
        sys.exit(130)
