"""pytest tests/test_cuda.py — the paper preset's step on a GPU that is not there.

A process of its own registers a device "gpu" that has no kernels, and runs the step on fake tensors
of it. They have shapes, types and a device, but no numbers. So what makes the host wait for a GPU
raises: `.item()`, `nonzero`, a boolean index, a copy to the CPU. A tensor of the CPU among those of
the GPU raises, too. Nothing here says what a GPU computes, or how fast."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the process of its own

import data
import losses
import model as networks
import text
import train
from batches import Batches
from objective import Objective

# What somebody might add to a loss: each must be found. None adds nothing, and must pass.
PLANTS = {
    "nothing": None,
    "item": lambda v: v.sum().item(),
    "tolist": lambda v: v[0].tolist(),
    "if": lambda v: 1 if v.sum() > 0 else 2,
    "nonzero": lambda v: (v > 0).nonzero(),
    "boolean index": lambda v: v[v[:, 0] > 0],
    "copy to the CPU": lambda v: v.detach().cpu(),
    "tensor of the CPU": lambda v: v * torch.ones(v.shape[1]),
    "index of the CPU": lambda v: v[torch.arange(2)],
}

# Autocast's rules for a GPU, as far as the step meets them: products in bf16, the others in fp32.
IN_BF16 = (
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "conv2d",
    "scaled_dot_product_attention",
)
IN_FP32 = (
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "cross_entropy_loss",
    "cumsum",
    "rsqrt",
    "exp",
    "log",
    "norm.ScalarOpt_dim",
    "linalg_vector_norm",
)


def register_gpu():
    """Register a device "gpu", in Python alone: backward, autocast and device checks work on it."""
    from torch.utils import backend_registration as registration

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

    parts = Module(), registration._DummyPrivateUse1Hook(), registration._DummyDeviceGuard()
    registration._setup_privateuseone_for_python_backend("gpu", *parts)
    other, rules = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    other.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def rule(name, dtype):
        op = getattr(torch.ops.aten, name.split(".")[0])
        op = getattr(op, name.split(".")[1] if "." in name else op.overloads()[0])

        def cast(x):
            wide = (
                isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
            )
            return x.to(dtype) if wide and x.device.type == "gpu" else x

        def run(*args, **more):
            with torch._C._ExcludeDispatchKeyGuard(key):
                args, more = torch.utils._pytree.tree_map(cast, (args, more))
                return op(*args, **more)

        rules.impl(name, run, "AutocastPrivateUse1")

    for name in IN_BF16:
        rule(name, torch.bfloat16)
    for name in IN_FP32:
        rule(name, torch.float32)
    return parts, other, rules  # they hold as long as somebody keeps them


class Fake(FakeTensorMode):
    """Tensors without numbers, on a device without memory."""

    avoid_device_init = True


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Raise where tensors of both devices meet, but for numbers and for copies to the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        used = {x.device.type for x in tensors if x.dim()}
        made = {x.device.type for x in leaves(out) if isinstance(x, torch.Tensor)}
        copies = "copy" in func.__name__
        # Numbers may come from the CPU, and copies may go to the GPU.
        if "gpu" in {x.device.type for x in tensors} and (
            "cpu" in made or "cpu" in used and not copies
        ):
            raise RuntimeError(
                f"{func}: a tensor of the CPU among those of the GPU, or a copy back"
            )
        return out


def scaled_down():
    """Return the paper's networks, each part as small as takes the same way through the code."""
    small = dict(networks.SIZES["paper"])
    small["vision"] = dict(small["vision"], size=64, width=32, depth=2, heads=2)
    small["text"] = dict(small["text"], width=32, depth=2, heads=2)
    small["fusion"] = dict(small["fusion"], width=32, depth=2, heads=2, pool=2)
    return dict(small, embed=16, simsiam=(32, 16))


def build(folder, *flags):
    """-> (settings of the paper preset, a tokenizer, a batch as the loader gives it for a GPU)."""
    networks.SIZES["paper"] = scaled_down()
    cfg = train.parse(
        ["--preset", "paper", "--vision", "random", "--bags", "4", "--ram", "0", *flags]
    )
    bags = data.BagDataset(Path(folder) / "train")
    captions = (caption for i in range(len(bags)) for caption in bags.captions(i) if caption)
    tokenizer = text.Tokenizer.train(captions, 600)
    cfg = dataclasses.replace(cfg, device="cuda")  # bags are left whole, for the device to cut
    return cfg, tokenizer, Batches(bags, tokenizer, cfg, 77)[3]


def on_gpu(cfg, tokenizer, batch):
    """-> (mode of fake tensors, settings, model, optimizer, objective, batch) on "gpu"."""
    with Fake(allow_non_fake_inputs=True) as fake:
        with torch.device("gpu"):  # for the weights alone: a step must name its device
            model = train.build_model(cfg, tokenizer)
        train.freeze(model.vision, "cuda")
        batch = {k: torch.empty(x.shape, dtype=x.dtype, device="gpu") for k, x in batch.items()}
        return (
            fake,
            cfg,
            model,
            train.make_optimizer(model, cfg, "cuda"),
            Objective(model, cfg),
            batch,
        )


def step(fake, cfg, model, optimizer, objective, batch):
    """One step as the loop does it -> the types of what must be fp32."""
    dtypes = []
    model.vision.register_forward_pre_hook(lambda _, x: dtypes.append(x[0].dtype))
    model.vision.blocks[0].register_forward_hook(lambda *x: dtypes.append(x[2].dtype))
    with fake, Watch():
        with torch.autocast("gpu", torch.bfloat16):
            parts, monitors = objective(batch)
        sum(parts.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        objective.follow()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert set(parts) == set(train.LOSSES) and all(p.grad is not None for p in learning)
    assert model.vision.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    return {
        str(d) for d in dtypes + [x.dtype for x in (*parts.values(), *(p.grad for p in learning))]
    }


def main(folder):
    """Print all cases, a line of JSON each: its name, what was raised or "", types of what is fp32.

    Each runs in a fork, and nothing is collected: torch crashes when such tensors are."""
    gc.disable()
    kept, itc = register_gpu(), losses.itc

    def case(name, made):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return
        try:
            dtypes, error = sorted(step(*made)), ""
        except Exception as e:
            dtypes, error = [], f"{type(e).__name__}: {e}"
        print(json.dumps([name, error, dtypes]), flush=True)
        os._exit(0)

    usual = on_gpu(*build(folder))
    for name, plant in PLANTS.items():
        losses.itc = itc if plant is None else lambda v, *x: (plant(v), itc(v, *x))[1]
        case(name, usual)
    losses.itc = itc
    case("one bag", on_gpu(*build(folder, "--bags", "1", "--scale_jitter", "0.3")))
    case("ema", on_gpu(*build(folder, "--cvta_select", "ema", "--cvta_negatives", "batch")))
    del kept


@pytest.fixture(scope="module")
def cases(world):
    """{case: (error, types)}, from a process of its own: other tests shall not see the device."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device in Python")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(world)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: (error, types) for name, error, types in map(json.loads, done.stdout.splitlines())
    }


@pytest.mark.parametrize("name", ["nothing", "one bag", "ema"])
def test_the_step_of_the_paper_preset_never_waits_for_the_gpu(cases, name):
    error, types = cases[name]
    assert not error
    assert types == ["torch.float32"]  # pixels, sums through the blocks, losses, gradients


@pytest.mark.parametrize("name", [name for name in PLANTS if name != "nothing"])
def test_what_would_wait_or_mix_devices_is_found(cases, name):
    assert cases[name][0], f"{name}: nobody noticed"


if __name__ == "__main__":
    main(sys.argv[1])
