"""pytest tests/test_train.py — settings, schedule, and the real script on a tiny built-in world: resumed equals uninterrupted,
two processes run, a kill loses nothing, mistakes get one sentence."""
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import losses
import train
from objective import Objective

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--bags", "4", "--words", "2", "--log_every", "1", "--warmup", "2", "--workers", "0", "--evaluate", "false", "--device", "cpu"]


def run(*argv, nproc=0, check=True):
    """train.py in a process of its own, from the repository's root."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if nproc else [sys.executable]
    done = subprocess.run([*start, "train.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six training and two test slides through the real path."""
    folder = tmp_path_factory.mktemp("world")
    train.make_world(folder, train=6, test=2)
    return folder


def test_flags_parse_by_type_and_mistakes_are_named():
    cfg = train.parse(["--lr", "1", "--compile", "false", "--steps=7", "--out", "a=b"])
    assert (cfg.lr, cfg.compile, cfg.steps, cfg.out) == (1.0, False, 7, "a=b")
    paper = train.parse(["--preset", "paper", "--k_o", "3", "--vision_weights", "uni.bin"])
    assert paper.k_o == 3 and paper.size == "paper"
    for argv, message in ((["--stesp", "3"], "did you mean --steps"), (["--preset", "x"], "unknown preset"), (["--children", "3"], "1, 2 or 4"),
                          (["--clip_weights", "x"], "needs --tokenizer"), (["--preset", "paper"], "would keep random weights"), (["--bags", "0"], "at least 1"),
                          (["--cvta_select", "x"], "cosine, ema, own"), (["--mrtva_pairs", "x"], "edges, ancestors"), (["--alpha", "1"], "below 1"), ([x for name in train.LOSSES for x in (f"--{name}", "0")], "nothing would be learned"), (["--queue", "-1"], "number of patches")):
        with pytest.raises(ValueError, match=message):
            train.parse(argv)


def test_schedule_by_hand():
    cfg = train.Config(lr=1.0, warmup=10, steps=110)
    rates = [train.learning_rate(s, cfg) for s in range(111)]
    assert rates[0] == 0.1 and rates[10] == 1.0 and rates[60] == pytest.approx(0.505) and rates[110] == pytest.approx(0.01)
    assert all(isinstance(r, float) and not hasattr(r, "dtype") for r in rates)  # a NumPy scalar would not load with weights_only


def test_batches_depend_on_the_step_alone_and_cover_an_epoch(world):
    cfg = train.parse(["--bags", "4"])
    bags = train.data.BagDataset(world / "train")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    one, again = train.Batches(bags, tokenizer, cfg, 64)[3], train.Batches(bags, tokenizer, cfg, 64)[3]
    assert all(torch.equal(one[k], again[k]) for k in one)
    halves = [train.Batches(bags, tokenizer, cfg, 64, rank, 2) for rank in (0, 1)]
    order = [h._at((i * 2 + r) * 2 + j) for i in range(len(bags) // 4) for r, h in enumerate(halves) for j in range(2)]
    assert len(set(order)) == len(order) and len(order) > len(bags) - 4  # both ranks together: no bag twice in an epoch
    assert torch.equal(one["bag"], torch.tensor([train.Batches(bags, tokenizer, cfg, 64)._at(12 + j) for j in range(4)]))
    shared = {w.item() for w in one["word"][0][one["w_valid"][0]]} & {w.item() for w in one["word"][1][one["w_valid"][1]]}
    text = lambda b: {tuple(one["keywords"][k].tolist()) for k in one["bag_of"][b][one["w_valid"][b]]}
    assert len(shared) == len(text(0) & text(1)) > 0  # equal numbers stand for equal keywords
    ramp = [train.Batches(bags, tokenizer, train.parse(["--bags", "4", "--alpha", "0.4", "--accumulate", "2"]), 64)[i]["alpha"].item() for i in (0, 1, 2, 1000)]
    assert ramp == pytest.approx([0, 0, 0.4 * 4 / len(bags), 0.4])  # over the first epoch
    own = one["own"]  # a keyword owned by a node stands in its caption
    words = [tokenizer.decode(k.tolist()) for k in one["keywords"]]
    b, n, k = own.nonzero()[0].tolist()
    assert words[one["bag_of"][b, k]].split()[0][:4] in tokenizer.decode(one["ids"][b, n].tolist())


def test_scale_jitter_enlarges_squares_of_a_bag(world):
    bags = train.data.BagDataset(world / "train")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    plain, again, zoomed = (train.Batches(bags, tokenizer, train.parse(["--bags", "4", "--scale_jitter", s]), 64)[3] for s in ("0", "0", "0.5"))
    assert torch.equal(plain["pixels"], again["pixels"]) and plain["window"].shape == (4, 0)
    side, corner = zoomed["window"][:, :1], zoomed["window"][:, 1:]
    assert (side >= 0.5).all() and (side < 1).all() and (corner >= 0).all() and (corner + side <= 1).all()
    assert zoomed["pixels"].shape == plain["pixels"].shape and not torch.equal(zoomed["pixels"], plain["pixels"])
    b = int(side.argmin())  # the enlarged parent is that square of the bag
    i = train.Batches(bags, tokenizer, train.parse(["--bags", "4"]), 64)._at(3 * 4 + b)
    n, image = 8 * bags.S, bags[i]["image"].float()
    s, y, x = (int(round(v * n)) for v in zoomed["window"][b].tolist())
    want = torch.nn.functional.interpolate(image[None, :, y:y + s, x:x + s], size=(bags.S, bags.S), mode="area")[0] / 255
    assert (zoomed["pixels"][b, 0] - want).abs().mean() < 0.02 < (plain["pixels"][b, 0] - want).abs().mean()
    with pytest.raises(ValueError, match="scale_jitter"):
        train.parse(["--scale_jitter", "1"])


def test_weight_zero_removes_a_loss_and_every_parameter_learns(world, tmp_path):
    cfg = train.parse(["--bags", "4", "--cvta", "0"])
    bags = train.data.BagDataset(world / "train")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    batch = train.Batches(bags, tokenizer, train.parse(["--bags", "4"]), 64)[0]
    patches = batch["pixels"]  # the CPU loader has cut them
    parts, _ = Objective(train.build_model(cfg, tokenizer), cfg)(patches, batch)
    assert set(parts) == {"itc", "itm", "mlm", "plm", "mrtva"}
    cfg = train.parse(["--bags", "4"])
    model = train.build_model(cfg, tokenizer)
    parts, monitors = Objective(model, cfg)(patches, batch)
    sum(parts.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # an untrained model stands at chance: ln V, and for ITC ln M plus half the variance of its logits, 1 / (d tau^2) for random unit vectors
    rows = int(batch["valid"].sum())
    assert parts["itc"].item() == pytest.approx(torch.tensor(rows).log().item() + 0.5 / (128 * 0.07 ** 2), abs=0.6)
    assert parts["plm"].item() == pytest.approx(torch.tensor(float(tokenizer.size)).log().item(), abs=0.5)


def test_the_objective_compiles_whole_and_once(world):
    cfg = train.parse(["--bags", "4", "--steps", "8", "--warm", "0.4", "--hand", "0.4", "--keywords", "40", "--alpha", "0.4",
                       "--queue", "50", "--cvta_select", "ema"])
    bags = train.data.BagDataset(world / "train")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    batches, objective = train.Batches(bags, tokenizer, cfg, 64), Objective(train.build_model(cfg, tokenizer), cfg)
    counted = CompileCounterWithBackend("eager")
    compiled, shapes = torch.compile(objective, dynamic=False, fullgraph=True, backend=counted), set()
    for i in range(8):
        batch = batches[i]
        train.mark_lengths(batch)
        shapes.add((batch["ids"].shape[2], *batch["keywords"].shape))
        twin = copy.deepcopy(objective)                                                # a step changes the queue
        torch.manual_seed(i)
        (parts, _) = compiled(batch["pixels"], batch)
        if i in (0, 7):                                                                # on both sides of the hand-over
            torch.manual_seed(i)
            expected, _ = twin(batch["pixels"], batch)
            assert set(parts) == set(train.LOSSES) and all(torch.allclose(parts[k], expected[k], atol=1e-5) for k in parts)
    assert len(shapes) > 2 and counted.frame_count == 1


def test_a_frozen_tower_enters_neither_optimiser_nor_buckets(world, tmp_path):
    cfg = train.parse(["--bags", "4", "--freeze_vision", "true"])
    tokenizer = train.text.Tokenizer.train(["a sheet of cells"] * 3, 600)
    model = train.build_model(cfg, tokenizer)
    model.vision.requires_grad_(False)
    held = {id(p) for group in train.make_optimizer(model, cfg, "cpu").param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("vision.")}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(Objective(model, cfg))
        buckets = ddp._get_ddp_logging_data()["bucket_sizes"]                  # bytes, "a, b, ..."
        assert sum(map(int, str(buckets).split(","))) == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
    run("--data", world, "--freeze_vision", "true", *SMALL, "--out", tmp_path / "run", "--steps", 2)
    after = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"]
    before = train.build_model(cfg, train.text.Tokenizer.load(tmp_path / "run" / "tokenizer.json")).state_dict()
    assert {k for k in after if torch.equal(after[k], before[k])} == {k for k in after if k.startswith("vision.")}    # batch norm's averages too


def test_words_first_learn_which_words_mean_the_same():
    pairs = ["gland acinus", "nest island", "cord trabecula", "papilla frond", "sheet diffuse", "spindle fascicle", "mucin vacuole", "fat adipose"]
    captions = [[f"the image shows {p.split()[(n + i) % 2]}" for n in range(85)] for p in pairs for i in range(2)]  # never both words in one caption
    bags = types.SimpleNamespace(slides=[str(i // 2) for i in range(16)], captions=lambda i, nodes: [captions[i][n] for n in nodes], valid=[torch.ones(85, dtype=torch.bool)] * 16)
    tokenizer = train.text.Tokenizer.train(captions[0] + captions[5], 300)
    cfg = train.parse(["--words", "120"])

    def right(model):  # is the nearest of the second words the one of the same slide?
        with torch.no_grad():
            a, b = (torch.nn.functional.normalize(model.text(tokenizer.batch([f"the image shows {p.split()[w]}" for p in pairs], 64))[1], dim=-1) for w in (0, 1))
        return ((a @ b.T).argmax(1) == torch.arange(8)).float().mean().item()

    models = [train.build_model(cfg, tokenizer) for _ in range(2)]
    before = right(models[0])
    for model in models:
        train.learn_words(model, bags, tokenizer, cfg, 64)
    assert before < 0.5 and right(models[0]) > 0.9 and all(p.grad is None for p in models[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()))  # ranks must agree


def test_resumed_equals_uninterrupted_bitwise(world, tmp_path):
    memory = ["--alpha", "0.4", "--queue", "50"]
    run("--data", world, "--out", tmp_path / "whole", "--steps", 6, *SMALL, *memory)
    first = subprocess.Popen([sys.executable, "train.py", "--data", str(world), "--out", str(tmp_path / "parts"), "--steps", "6", *SMALL, *memory, "--save_every", "1", "--workers", "1"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    log = tmp_path / "parts" / "log.jsonl"
    while first.poll() is None and not (log.exists() and '"step": 2' in log.read_text()):
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGTERM)  # as torchrun and a terminal do: the loader's process gets it too
    assert first.wait(60) == 0
    step = torch.load(tmp_path / "parts" / "ckpt.pt", weights_only=True)["step"]
    assert 2 <= step <= 6
    again = run("--data", world, "--out", tmp_path / "parts", "--steps", 6, *SMALL, *memory)
    assert f"at step {step} of 6" in again.stdout + again.stderr
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "parts"))
    before = torch.load(tmp_path / "parts" / "ckpt_prev.pt", weights_only=True)
    assert before["step"] < 6 and not torch.equal(before["memory"]["slow.proj.weight"], b["memory"]["slow.proj.weight"])  # it follows
    assert a["step"] == b["step"] == 6 and "queue_v" in a["memory"] and "slow.proj.weight" in a["memory"]
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "memory") for k in a[part])


def test_checkpoint_of_other_settings_is_refused_and_a_broken_one_falls_back(world, tmp_path):
    run("--data", world, "--out", tmp_path / "r", "--steps", 2, "--save_every", 1, *SMALL)
    done = run("--data", world, "--out", tmp_path / "r", "--steps", 2, "--lr", "0.5", *SMALL, check=False)
    assert done.returncode == 1 and "lr 0.002 -> 0.5" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "r" / "ckpt.pt").write_bytes(b"cut off")
    cfg = train.parse(["--out", str(tmp_path / "r"), "--steps", "2", *SMALL])
    assert train.load_checkpoint(tmp_path / "r", cfg, "cpu")["step"] == 1


def test_two_processes_train(world, tmp_path):
    run("--data", world, "--out", tmp_path / "two", "--steps", 3, *SMALL, nproc=2)
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["world"] == 2 and [r["step"] for r in rows[1:]] == [1, 2, 3]


def test_mistakes_get_one_sentence(world, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    path = sorted((broken / "train").glob("*.captions.jsonl"))[0]
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"node": 3,' not in line) + "\n")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for argv, message in ((["--stesp", "3"], "did you mean --steps"), (["--data", broken], r"has no caption for node 3 of bag"),
                          (["--data", tmp_path / "empty"], "holds no bags"), (["--data", world, "--bags", 5, "--accumulate", 2], "cannot be split")):
        done = run(*argv, "--out", tmp_path / "x", check=False)
        assert done.returncode == 1 and re.search(message, done.stderr) and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr


def test_global_batch_of_level_sizes():
    assert losses.level_sizes(85, 4) == [1, 4, 16, 64] and losses.level_sizes(4, 1) == [1, 1, 1, 1]
