"""Take the paper preset's step on a GPU that is not there: pytest tests/test_cuda.py

A process of its own registers a device "gpu" that has no kernels, and runs the step on fake tensors
of it. They have shapes, types and a device, but no numbers. So what makes the host wait for a GPU
raises: `.item()`, `nonzero`, a boolean index, a copy to the CPU. A tensor of the CPU among those of
the GPU raises, too. Nothing here says what a GPU computes, or how fast.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.utils.backend_registration
from conftest import LOSSES
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import losses
import model as networks
import text
import train

ROOT = Path(__file__).resolve().parent.parent

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
IN_BF16 = "matmul mm bmm addmm baddbmm linear conv2d scaled_dot_product_attention".split()
IN_FP32 = """softmax.int log_softmax.int layer_norm cross_entropy_loss cumsum rsqrt exp log
norm.ScalarOpt_dim linalg_vector_norm""".split()


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
            on_gpu = isinstance(x, torch.Tensor) and x.device.type == "gpu"
            wide = on_gpu and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if wide else x

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
        mixed = "cpu" in made or ("cpu" in used and not copies)
        if mixed and "gpu" in {x.device.type for x in tensors}:
            raise RuntimeError(f"{func}: the CPU among tensors of the GPU, or a copy back")
        return out


def scaled_down():
    """Return the paper's networks, each part as small as takes the same way through the code."""
    small = dict(networks.SIZES["paper"])
    small["vision"] = dict(small["vision"], size=64, width=32, depth=2, heads=2)
    small["text"] = dict(small["text"], width=32, depth=2, heads=2)
    small["fusion"] = dict(small["fusion"], width=32, depth=2, heads=2, pool=2)
    return dict(small, embed=16, simsiam=(32, 16))


def build(folder, *flags):
    """Return settings of the paper preset, a tokenizer and a batch as the loader gives it."""
    networks.SIZES["paper"] = scaled_down()
    argv = ["--preset", "paper", "--vision", "random", "--bags", "4", *flags]
    cfg = train.parse(argv)
    bags, captions = data.Bags(Path(folder) / "train"), text.Captions(Path(folder) / "train")
    told = [caption for key in bags.keys for caption in captions[key] if caption]
    tokenizer, corpus = text.Tokenizer.train(told, 600), text.count_corpus(told)
    return cfg, tokenizer, data.Batches(bags, captions, tokenizer, corpus, cfg, 77)[3]


def on_gpu(cfg, tokenizer, batch):
    """Put the networks and the batch on "gpu" -> (mode of fake tensors, settings, ...)."""
    with Fake(allow_non_fake_inputs=True) as fake:
        # For the weights alone: a step must name its device.
        with torch.device("gpu"):
            objective = losses.Objective(train.build_model(cfg, tokenizer), cfg)
        # Cast as train.freeze does on a GPU: Module.to cannot exchange fake weights.
        train.freeze(objective.model.vision, "cpu")
        for module in objective.model.vision.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for p in module.parameters():
                    p.data = p.data.to(torch.bfloat16)
        batch = {k: torch.empty(x.shape, dtype=x.dtype, device="gpu") for k, x in batch.items()}
        return fake, cfg, objective, train.make_optimizer(objective, cfg), batch


def step(fake, cfg, objective, optimizer, batch):
    """Take one step as the loop does, the augmentation first -> the types of what must be fp32."""
    dtypes = []
    vision = objective.model.vision
    vision.register_forward_pre_hook(lambda _, x: dtypes.append(x[0].dtype))
    vision.blocks[0].register_forward_hook(lambda *x: dtypes.append(x[2].dtype))
    with fake, Watch():
        batch = data.to_device(batch, cfg, "gpu")
        with torch.autocast("gpu", torch.bfloat16):
            parts, monitors = objective(batch)
        loss = sum(getattr(cfg, name) * part for name, part in parts.items())
        loss.backward()
        found = torch.stack([loss, *parts.values(), *monitors.values()]).detach()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), cfg.clip)
        good = norm.isfinite()
        optimizer.found_inf = (~good).float()
        optimizer.step()
        for scale in (objective.model.itc_scale, objective.model.cvta_scale):
            scale.data.clamp_(-1, 1)
        torch.where(good, found, 0)
    learning = [p for p in objective.parameters() if p.requires_grad]
    assert set(parts) == set(LOSSES) and all(p.grad is not None for p in learning)
    assert vision.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    dtypes += [x.dtype for x in (*parts.values(), *(p.grad for p in learning))]
    return {str(dtype) for dtype in dtypes}


def main(folder):
    """Print a line of JSON for each case: its name, what was raised or "", types of what is fp32.

    Each runs in a fork, and nothing is collected: torch crashes when such tensors are.
    """
    gc.disable()
    children = []
    kept, itc, flip = register_gpu(), losses.itc, data.flip

    def case(name, made):
        children.append(os.fork())
        if children[-1]:
            return
        try:
            dtypes, error = sorted(step(*made)), ""
        except Exception as e:
            dtypes, error = [], f"{type(e).__name__}: {str(e)[:1000]}"
        # One short write comes whole out of several processes.
        os.write(1, (json.dumps([name, error, dtypes]) + "\n").encode())
        os._exit(0)

    usual = on_gpu(*build(folder))
    for name, plant in PLANTS.items():
        if plant is not None:
            losses.itc = lambda v, *x, plant=plant: (plant(v), itc(v, *x))[1]
        case(name, usual)
    losses.itc = itc
    data.flip = lambda patches, flips: flip(patches, flips)[flips > 3]
    case("in augment", usual)
    data.flip = flip
    case("one bag", on_gpu(*build(folder, "--bags", "1")))
    case("batch", on_gpu(*build(folder, "--negatives", "batch", "--near", "0.95")))
    for child in children:
        os.waitpid(child, 0)
    del kept


@pytest.fixture(scope="module")
def cases(world):
    """Return {case: [error, types]}, of a process of its own: no other test may see the device."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device in Python")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(world)]
    more = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **more)
    assert done.returncode == 0, done.stderr
    return {name: found for name, *found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ["nothing", "one bag", "batch"])
def test_the_step_of_the_paper_preset_never_waits_for_the_gpu(cases, name):
    error, types = cases[name]
    assert not error
    assert types == ["torch.float32"]  # pixels, sums through the blocks, losses, gradients


@pytest.mark.parametrize("name", [*[name for name in PLANTS if name != "nothing"], "in augment"])
def test_what_would_wait_or_mix_devices_is_found(cases, name):
    assert cases[name][0], f"{name}: nobody noticed"


if __name__ == "__main__":
    main(sys.argv[1])
