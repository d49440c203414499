"""What the stages of gpu.py share: batches in a file, clocks, and a step as the loop does it."""

import functools
import io
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

# Slides are read on the machine that prepares. Elsewhere these packages may be missing.
for package in ("imagecodecs", "tifffile"):
    try:
        __import__(package)
    except ImportError:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].jpeg8_decode = lambda x: np.array(Image.open(io.BytesIO(x)))
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import model as networks
import text
import train
from batches import Batches, make_world
from objective import Objective

GPU = torch.cuda.is_available()
DEVICE, ROUNDS = ("cuda", 20) if GPU else ("cpu", 2)
ARGS, FILE = types.SimpleNamespace(tiny=False), {}  # set by gpu.py


def row(name, *told):
    """Print a row at once: a later stage may not come to its end."""
    print(f"{name:22}", *told, sep=" | ", flush=True)


class Prepared(Dataset):
    """Batches of a file; their pixels are decoded from JPEG when they are asked for."""

    def __init__(self, kept, times=1):
        self.kept, self.times = kept, times

    def __len__(self):
        return len(self.kept) * self.times

    def __getitem__(self, i):
        batch = dict(self.kept[i % len(self.kept)])
        images = [np.array(Image.open(io.BytesIO(x.numpy()))) for x in batch.pop("jpeg")]
        return batch | {"pixels": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}


def read(kind):
    """Return the batches of a kind (whole, half, curve) on the device."""
    kept = Prepared(FILE[kind])
    return [{k: x.to(DEVICE) for k, x in kept[i].items()} for i in range(len(kept))]


def settings(*flags):
    """Return the settings of the paper preset with random weights."""
    argv = ["--preset", "paper", "--vision", "random", "--ram", "0", *flags]
    return train.parse([str(x) for x in argv])


def autocast():
    """Return the loop's autocast."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=GPU)


def compiled(module, **more):
    """Compile; at tiny size without code of its own, which takes a CPU minutes."""
    return torch.compile(module, backend="eager" if ARGS.tiny else "inductor", **more)


def seconds(call):
    """Return the median time of a call."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@functools.cache
def rate():
    """Return the FLOP/s of large matrix products, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if GPU else (256, torch.float32)
    x = torch.rand(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / seconds(lambda: x @ x)


def mfu(flops, time_):
    """Say how long some work took, and its share of the rate of matrix products."""
    return f"{1000 * time_:.1f} ms, {flops / time_ / rate():.3f} of {rate() / 1e12:.2f} TFLOP/s"


class Step:
    """A training step as the loop does it, with networks of its own."""

    def __init__(self, kind, compile=True):
        self.cfg, self.compile = settings("--children", FILE["children"][kind]), compile
        words = types.SimpleNamespace(size=FILE["vocab"], end=FILE["end"])
        self.model = train.build_model(self.cfg, words).to(DEVICE)
        train.freeze(self.model.vision, DEVICE)
        self.optimizer = train.make_optimizer(self.model, self.cfg, DEVICE)
        self.run = self.objective = Objective(self.model, self.cfg)
        if compile:
            self.run = compiled(self.objective, dynamic=False, fullgraph=True)

    def __call__(self, batch):
        if self.compile:
            train.mark_lengths(batch)
        with autocast():
            loss = sum(self.run(batch)[0].values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.follow()
        return loss.detach()

    def measure(self, name, batch):
        """Print a row about steps on one batch. The FLOPs are those that one eager step has."""
        with FlopCounterMode(display=False) as count, autocast():
            sum(self.objective(batch)[0].values()).backward()
        self.optimizer.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self(batch)
        first = time.perf_counter() - begin
        time_, B = seconds(lambda: self(batch)), len(batch["bag"])
        memory = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0
        row(
            name,
            f"{B} bags, {B / time_:.2f} bags/s",
            mfu(count.get_total_flops(), time_),
            f"{memory:.1f} GB",
            f"first step {first:.0f} s",
        )


def shrink():
    """Make the paper's networks small, to try the stages on a CPU."""
    size = networks.SIZES["paper"]
    small = {k: dict(size[k], width=32, depth=2, heads=2) for k in ("vision", "text", "fusion")}
    small["vision"]["size"] = 64
    networks.SIZES["paper"] = dict(size, **small, embed=16, simsiam=(32, 16))


def jpeg(pixels):
    """uint8 [3, H, W] -> the bytes of its JPEG, uint8 [n]."""
    content = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=90)
    return torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)


def prepare():
    """Write batches with their pictures, and the losses of the smallest ones on a CPU."""
    nodes, many = (2, 4) if ARGS.tiny else (4, 16)
    side = networks.SIZES["paper"]["vision"]["size"]
    FILE["children"] = {"whole": nodes, "half": nodes, "curve": 1}
    with tempfile.TemporaryDirectory() as folder:
        make_world(folder, train=many, test=1, patch_px=side)
        bags = data.BagDataset(Path(folder) / "train")
        captions = [c for i in range(len(bags)) for c in bags.captions(i) if c]
        words = text.Tokenizer.train(captions, 1500)
        FILE.update(vocab=words.size, end=words.end)
        for kind, count, B in (("whole", 3, many), ("half", 1, many // 2), ("curve", 3, 2)):
            # On a "cuda" device the loader leaves the cutting to the step.
            cfg = settings("--bags", B, "--children", FILE["children"][kind], "--device", "cuda")
            FILE[kind] = [Batches(bags, words, cfg, 77)[i] for i in range(count)]
            for i, batch in enumerate(FILE[kind]):
                batch["jpeg"] = [jpeg(x) for x in batch.pop("pixels")]
                if i == 1:  # as long as captions can be
                    T = batch["ids"].shape[2]
                    batch["ids"] = torch.nn.functional.pad(batch["ids"], (0, 77 - T))
    again = Step("curve", False)
    FILE["losses"] = [again(batch).item() for batch in read("curve")]
    torch.save(FILE, ARGS.file)
    row("prepared", ARGS.file, f"{Path(ARGS.file).stat().st_size / 1e6:.0f} MB")
