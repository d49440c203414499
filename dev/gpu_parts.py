"""Share among bench.py and gpu.py: clocks, batches in a file, and a step as train.py does it."""

import contextlib
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
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

# Slides are read on the machine that prepares; elsewhere their packages may be missing.
try:
    import imagecodecs
    import tifffile
except ImportError:
    imagecodecs = sys.modules["imagecodecs"] = types.ModuleType("imagecodecs")
    imagecodecs.jpeg8_decode = lambda x: np.array(Image.open(io.BytesIO(x)))
    tifffile = sys.modules["tifffile"] = types.ModuleType("tifffile")

import data
import losses
import model as networks
import text
import train
from prepare.world import make_world

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE, ROUNDS = ("cuda", 20) if GPU else ("cpu", 2)
PRODUCTS, COPY = "products", "copying"
# gpu.py sets these: its arguments, and what it prepared.
ARGS, FILE = types.SimpleNamespace(tiny=False), {}


# ---- Clocks -------------------------------------------------------------------------------------


def row(name, *told):
    """Print a row at once: a later stage may not come to its end."""
    print(f"{name:22}", *told, sep=" | ", flush=True)


def wait():
    """Wait until the GPU has done all it was asked to do."""
    if GPU:
        torch.cuda.synchronize()


def interleave(calls, rounds):
    """Run calls {name: function} in turn, after a warm-up -> {name: seconds of each round}."""
    times = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            # Leave out the first round, which warms up.
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def seconds(call):
    """Return the median time of a call."""
    return statistics.median(interleave({"": call}, ROUNDS)[""])


def share_of_waiting(loader, step):
    """Take a step on each batch of a loader -> the share of the time that passed in waiting."""
    coming = iter(loader)
    # Do not count the start of the loader's processes.
    step(next(coming))
    wait()
    start, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        batch = next(coming, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return waited / (time.perf_counter() - start)
        step(batch)
        wait()


def machine_limits():
    """Return {limit: (call, its FLOPs or bytes)}: bf16 products on a GPU, and copies of memory."""
    n, dtype = (8192, torch.bfloat16) if GPU else (1024, torch.float32)
    square = torch.rand(n, n, device=DEVICE, dtype=dtype)
    source = torch.rand(2**28 if GPU else 2**25, device=DEVICE)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    return {PRODUCTS: (lambda: square @ square, 2 * n**3), COPY: (copy, 2 * source.nbytes)}


def count_flops(call):
    """Count the FLOPs of a call. On a CPU the counter sees attention only as plain products."""
    plain = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain:
        call()
    return counter.get_total_flops()


@functools.cache
def rate():
    """Return the FLOP/s of large matrix products."""
    call, flops = machine_limits()[PRODUCTS]
    return flops / seconds(call)


def mfu(flops, time_):
    """Say how long some work took, and its share of the rate of matrix products."""
    return f"{1000 * time_:.1f} ms, {flops / time_ / rate():.3f} of {rate() / 1e12:.2f} TFLOP/s"


# ---- Batches ------------------------------------------------------------------------------------


def jpeg(pixels):
    """Encode uint8 [3, H, W] as JPEG -> its bytes, uint8 [n]."""
    content = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=90)
    return torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)


class Prepared(Dataset):
    """Give the batches of a file; their pixels are decoded from JPEG when they are asked for."""

    def __init__(self, kept, times=1):
        self.kept, self.times = kept, times

    def __len__(self):
        return len(self.kept) * self.times

    def __getitem__(self, i):
        batch = dict(self.kept[i % len(self.kept)])
        images = [np.array(Image.open(io.BytesIO(x.numpy()))) for x in batch.pop("jpeg")]
        return batch | {"pixels": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}


def on_device(batch):
    """Copy a batch to the device, as it leaves the loader."""
    return {name: x.to(DEVICE) for name, x in batch.items()}


def read(kind):
    """Return the batches of a kind (whole, half, curve) on the device."""
    kept = Prepared(FILE[kind])
    return [on_device(kept[i]) for i in range(len(kept))]


def settings(*flags):
    """Return the settings of the paper preset with random weights."""
    argv = ["--preset", "paper", "--vision", "random", "--device", DEVICE, *flags]
    return train.parse([str(word) for word in argv])


def paper_batches(folder, cfg, slides=1):
    """Make bags as large as the paper's in a folder -> (data.Batches, its tokenizer)."""
    side = networks.SIZES["paper"]["vision"]["size"]
    make_world(folder, train=slides, test=1, patch_px=side, words=0)
    bags, captions = data.Bags(Path(folder) / "train"), text.Captions(Path(folder) / "train")
    words = text.Tokenizer.train((c for key in bags.keys for c in captions[key] if c), 1500)
    corpus = data.count_keywords(bags, captions)
    context = networks.SIZES["paper"]["text"]["context"]
    batches = data.Batches(bags, captions, words, corpus, cfg, context)
    batches.augments = False  # as on a GPU
    return batches, words


def prepare():
    """Write batches with their pictures, and the losses of the smallest ones on a CPU."""
    nodes, many = (2, 4) if ARGS.tiny else (4, 16)
    FILE["children"] = {"whole": nodes, "half": nodes, "curve": 1}
    with tempfile.TemporaryDirectory() as folder:
        for kind, count, B in (("whole", 3, many), ("half", 1, many // 2), ("curve", 3, 2)):
            cfg = settings("--bags", B, "--children", FILE["children"][kind])
            batches, words = paper_batches(folder, cfg, many)
            FILE.update(vocab=words.size, end=words.end)
            FILE[kind] = [batches[i] for i in range(count)]
            # Keep pictures as JPEG: decoding is what a loader does.
            for i, batch in enumerate(FILE[kind]):
                batch["jpeg"] = [jpeg(x) for x in batch.pop("pixels")]
                # Make one batch as long as captions can be.
                if i == 1:
                    T = batch["ids"].shape[2]
                    batch["ids"] = F.pad(batch["ids"], (0, batches.context - T))
    # Take the losses of three steps on this machine, to compare a GPU's with.
    again = Step("curve", False)
    FILE["losses"] = [again(batch).item() for batch in read("curve")]
    torch.save(FILE, ARGS.file)
    row("prepared", ARGS.file, f"{Path(ARGS.file).stat().st_size / 1e6:.0f} MB")


# ---- The step -----------------------------------------------------------------------------------


def autocast():
    """Return the loop's autocast."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=GPU)


def compiled(module, **more):
    """Compile; at tiny size without code of its own, which takes a CPU minutes."""
    return torch.compile(module, backend="eager" if ARGS.tiny else "inductor", **more)


def shrink():
    """Make the paper's networks small, to try the stages on a CPU."""
    size = networks.SIZES["paper"]
    small = {k: dict(size[k], width=32, depth=2, heads=2) for k in ("vision", "text", "fusion")}
    small["vision"]["size"] = 64
    networks.SIZES["paper"] = dict(size, **small, embed=16, simsiam=(32, 16))


def begin():
    """Set precision as the loop does, make tiny networks small, and print the machine."""
    if ARGS.tiny:
        shrink()
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name() if GPU else "cpu"
    row("machine", card, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads")


class Networks:
    """Hold the paper's networks, their objective and optimiser; called with a batch: a step."""

    def __init__(self, cfg, words):
        self.cfg, self.model = cfg, train.build_model(cfg, words)
        self.run = self.objective = losses.Objective(self.model, cfg).to(DEVICE)
        train.freeze(self.model.vision, DEVICE)
        self.optimizer = train.make_optimizer(self.objective, cfg)
        if cfg.compile:
            self.run = compiled(self.objective, dynamic=False, fullgraph=True)

    def __call__(self, batch):
        batch = data.to_device(batch, self.cfg, DEVICE)
        with autocast():
            parts, _ = self.run(batch)
        loss = sum(parts.values())
        # Backward and update, with the guard against steps that are not finite.
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.cfg.clip)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def flops(self, batch):
        """Count the FLOPs of a step, forward and backward."""
        batch = data.to_device(batch, self.cfg, DEVICE)
        return train.count_flops(self.objective, batch, autocast())


class Step(Networks):
    """Hold the networks for the batches of a kind, compiled or not."""

    def __init__(self, kind, compile=True):
        cfg = settings("--children", FILE["children"][kind])
        cfg.compile = compile
        super().__init__(cfg, types.SimpleNamespace(size=FILE["vocab"], end=FILE["end"]))

    def measure(self, name, batch):
        """Print a row about steps on one batch."""
        flops = self.flops(batch)
        # Time the first step alone: it compiles.
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self(batch)
        wait()
        first = time.perf_counter() - begin
        time_, B = seconds(lambda: self(batch)), len(batch["bag"])
        memory = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0
        speed = f"{B} bags, {B / time_:.2f} bags/s"
        row(name, speed, mfu(flops, time_), f"{memory:.1f} GB", f"first step {first:.0f} s")
