"""pytest tests/test_train.py — settings, schedule, and the real script on a tiny built-in world: killed equals undisturbed, two processes
equal one, what is not finite is left out, cached equals online, mistakes get one sentence."""
import copy
import dataclasses
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

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from conftest import Script, script

import losses
import runs
import train
from objective import Objective

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--bags", "4", "--words", "2", "--log_every", "1", "--warmup", "2", "--workers", "0", "--eval_every", "0", "--evaluate", "false", "--device", "cpu"]


def launch(nproc):
    """How a script is started on so many processes; 0: without torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if nproc else [sys.executable]


def run(*argv, nproc=0, check=True):
    """train.py in a process of its own, from the repository's root."""
    if not nproc:
        return script("train.py", *argv, timeout=120, check=check)
    done = subprocess.run([*launch(nproc), "train.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_flags_parse_by_type_and_mistakes_are_named():
    cfg = train.parse(["--lr", "1", "--compile", "false", "--steps=7", "--out", "a=b"])
    assert (cfg.lr, cfg.compile, cfg.steps, cfg.out) == (1.0, False, 7, "a=b")
    paper = train.parse(["--preset", "paper", "--k_o", "3", "--vision", "random"])
    assert paper.k_o == 3 and paper.size == "paper" and paper.data == "data/synthetic-224" and train.parse(["--preset", "paper", "--vision", "random", "--data", "x"]).data == "x"
    for argv, message in ((["--stesp", "3"], "did you mean --steps"), (["--preset", "x"], "unknown preset"), (["--children", "3"], "1, 2 or 4"),
                          (["--text", "x"], "needs --tokenizer"), (["--preset", "paper"], "needs --vision FILE: UNI's"), (["--preset", "paper", "--vision", "x"], "needs --text FILE: QuiltNet's"),
                          (["--size", "paper", "--freeze_vision", "true"], "would keep random weights"), (["--cache", "true"], "needs --freeze_vision"), (["--bags", "0"], "at least 1"),
                          (["--cvta_select", "x"], "cosine, ema, own"), (["--mrtva_pairs", "x"], "edges, ancestors"), (["--alpha", "1"], "below 1"), ([x for name in train.LOSSES for x in (f"--{name}", "0")], "nothing would be learned"), (["--queue", "-1"], "number of patches")):
        with pytest.raises(ValueError, match=message):
            train.parse(argv)


def test_schedule_by_hand():
    cfg = train.Config(lr=1.0, warmup=10, steps=110)
    rates = [train.learning_rate(s, cfg) for s in range(111)]
    assert rates[0] == 0.1 and rates[10] == 1.0 and rates[60] == pytest.approx(0.505) and rates[110] == pytest.approx(0.01)
    assert all(isinstance(r, float) and not hasattr(r, "dtype") for r in rates)  # a NumPy scalar would not load with weights_only


def test_weight_zero_removes_a_loss_and_every_parameter_learns(world, tmp_path):
    cfg = train.parse(["--bags", "4", "--cvta", "0"])
    bags = train.data.BagDataset(world / "train")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    batch = train.Batches(bags, tokenizer, train.parse(["--bags", "4"]), 64)[0]
    parts, _ = Objective(train.build_model(cfg, tokenizer), cfg)(batch)
    assert set(parts) == {"itc", "itm", "mlm", "plm", "mrtva"}
    cfg = train.parse(["--bags", "4"])
    model = train.build_model(cfg, tokenizer)
    parts, monitors = Objective(model, cfg)(batch)
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
    counted = CompileCounterWithBackend("aot_eager")                                   # "eager" would not see a length that a tensor's strides fix
    compiled, shapes = torch.compile(objective, dynamic=False, fullgraph=True, backend=counted), set()
    for i in range(8):
        batch = batches[i]
        if i in (0, 3, 7):                                                             # as long as can be, shorter, and again
            batch["ids"] = torch.nn.functional.pad(batch["ids"], (0, 64 - batch["ids"].shape[2]))
        batch |= {"pixels": torch.stack([bags[j]["image"] for j in batch["bag"].tolist()])}      # as on a GPU: whole bags, to be cut in the graph
        train.mark_lengths(batch)
        shapes.add((batch["ids"].shape[2], *batch["keywords"].shape))
        twin = copy.deepcopy(objective)                                                # a step changes the queue
        (parts, _) = compiled(batch)
        if i in (0, 7):                                                                # on both sides of the hand-over
            expected, _ = twin(batch)
            assert set(parts) == set(train.LOSSES) and all(torch.allclose(parts[k], expected[k], atol=1e-5) for k in parts)
    assert len({T for T, *_ in shapes}) > 1 and len(shapes) > 2 and counted.frame_count == 1


COMPILED = """
import sys; sys.path.insert(0, {root!r})
import torch
whole = torch.compile
torch.compile = lambda *args, **more: whole(*args, **more, backend="aot_eager")        # no C++ compiler is needed
import train
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("more", [["--alpha", "0.4", "--queue", "30"], ["--accumulate", "2", "--pairs", "1"]])
def test_two_processes_train_compiled(world, tmp_path, more):
    """The script itself, with validation; captions of several processes are always as long as the context."""
    runner = tmp_path / "compiled.py"
    runner.write_text(COMPILED.format(root=str(ROOT)))
    argv = ["--data", str(world), "--steps", "10", *SMALL, *more, "--eval_every", "4"]
    done = subprocess.run([*launch(2), runner, *argv, "--compile", "true", "--out", tmp_path / "compiled"],
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run(*argv, "--out", tmp_path / "eager")                                            # one process, not compiled: the same curve
    a, b = runs.read_log(tmp_path / "eager"), runs.read_log(tmp_path / "compiled")
    assert b["loss"][0] == list(range(1, 11)) and b["val_loss"][0] == [4, 8]
    for name in ("loss", "val_loss"):
        assert b[name][1] == pytest.approx(a[name][1], rel=0.03), name                 # ten steps of Adam on rounding


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


def test_a_frozen_tower_keeps_its_sums_in_fp32(monkeypatch):
    """On a GPU the weights of its products are bf16, but nothing that is added to what runs through the blocks."""
    model = train.build_model(train.Config(), train.text.Tokenizer.train(["a sheet of cells"] * 3, 600))
    train.freeze(model.vision, "cuda")                                                 # weights only, the device does not matter
    products = {id(p) for m in model.vision.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) for p in m.parameters()}
    assert all(p.dtype == (torch.bfloat16 if id(p) in products else torch.float32) for p in model.vision.parameters())
    seen = []
    model.vision.blocks[0].register_forward_hook(lambda *x: seen.append(x[2].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.see(torch.rand(2, 3, 64, 64))
    assert seen == [torch.float32]


def test_validation_is_the_same_at_every_step(world):
    """No soft targets, no hand-over, and held-out bags are not kin of the training bags in the queue, whose numbers they share."""
    test = train.data.BagDataset(world / "test")
    tokenizer = train.text.Tokenizer.train([c for i in range(len(test)) for c in test.captions(i) if c], 600)
    fields = ["--bags", "1", "--alpha", "0.4", "--queue", "8"]

    def losses_of(*more, bag=0):
        cfg = train.parse(fields + list(more))
        torch.manual_seed(0)
        objective = Objective(train.build_model(cfg, tokenizer), cfg)
        for x in (objective.queue_v, objective.queue_t):
            x.copy_(torch.nn.functional.normalize(torch.randn(x.shape), dim=-1))
        objective.queue_bag[:8] = bag
        objective.eval()
        return train.validate(objective, train.Batches(test, tokenizer, cfg, 64), "cpu", torch.autocast("cpu", enabled=False))
    usual = losses_of()
    assert losses_of(bag=10 ** 6) == usual                                             # bags 0 and 1 are held out; so may be numbers of training
    assert losses_of("--warm", "0", "--hand", "0") == usual
    assert losses_of("--alpha", "0.1") == usual


def test_words_first_decay_no_norms(monkeypatch):
    made, usual = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *x, **more: made.append(usual(*x, **more)) or made[-1])
    bags = types.SimpleNamespace(slides=["a", "b"], captions=lambda i, nodes: ["a gland"] * len(nodes), valid=[torch.ones(85, dtype=torch.bool)] * 2)
    tokenizer = train.text.Tokenizer.train(["a sheet of cells"] * 3, 300)
    cfg = train.parse(["--words", "1"])
    model = train.build_model(cfg, tokenizer)
    train.learn_words(model, bags, tokenizer, cfg, 64)
    spared = {id(p) for group in made[0].param_groups if not group["weight_decay"] for p in group["params"]}
    learning = {id(p) for group in made[0].param_groups for p in group["params"]}
    assert spared == {id(p) for n, p in model.named_parameters() if id(p) in learning and (p.ndim < 2 or n.endswith(".pos"))} != set()


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


def test_mistakes_get_one_sentence(world, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    path = sorted((broken / "train").glob("*.captions.jsonl"))[0]
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"node": 3,' not in line) + "\n")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    done = run("--stesp", "3", check=False)
    assert done.returncode == 1 and done.stderr == "error: unknown flag --stesp; did you mean --steps?\n"          # one sentence, no traceback
    for argv, message in ((["--data", broken], r"has no caption for node 3 of bag"), (["--data", tmp_path / "empty"], "holds no bags"),
                          (["--data", world, "--bags", 5, "--accumulate", 2], "cannot be split"),
                          (["--preset", "paper", "--vision", tmp_path / "uni.bin", "--text", "q.bin", "--tokenizer", "b"], "uni.bin does not exist: UNI's weights are .* --vision random"),
                          (["--data", world, *SMALL, "--steps", 1, "--wandb", "p"], "pip install wandb")):
        with pytest.raises(ValueError, match=message):
            train.main([*map(str, argv), "--device", "cpu", "--out", str(tmp_path / "x")])


# ---- never lose work --------------------------------------------------------------------------------------------------

def weights_of(folder):
    return runs.read_checkpoint(folder)[0]


def equal(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "memory") for k in a[part])


def test_a_run_survives_kills_at_random_moments(world, tmp_path, monkeypatch):
    """Four of them; `python dev/kills.py` does two hundred."""
    monkeypatch.syspath_prepend(ROOT / "dev")
    import kills
    torch.set_num_threads(1)
    rounds = kills.torment(world, tmp_path, 24, 4, seed=1)
    assert sum(rounds[:2]) == 4
    assert (tmp_path / "killed" / "ckpt_prev.pt").exists() and "queue_v" in weights_of(tmp_path / "killed")["memory"]


def test_a_request_is_granted_and_the_next_process_goes_on(world, tmp_path):
    """SIGTERM to the whole group, as torchrun and a terminal do: the loader's process gets it too. Two processes, then one, then two; of two micro-batches."""
    more = [*SMALL, "--accumulate", "2", "--pairs", "1"]
    run("--data", world, "--out", tmp_path / "whole", "--steps", 9, *more)

    def until(step, name, nproc):
        argv = ["train.py", "--data", str(world), "--out", str(tmp_path / "parts"), "--steps", "9", *more, "--workers", "1"]
        with open(tmp_path / "said", "w+") as said:
            first = Script(*argv, before=os.setsid) if not nproc else subprocess.Popen([*launch(nproc), *argv], cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
            until = time.time() + 60
            while max(runs.read_log(tmp_path / "parts").get("loss", ([0],))[0], default=0) < step and time.time() < until:
                time.sleep(0.02)
            os.killpg(first.pid, name)
            done = first.wait(timeout=60)
            out = (tmp_path / "said").read_text() if nproc else done.stdout + done.stderr
        assert "stopped at step" in out and (nproc or done.returncode == 0), out
        return weights_of(tmp_path / "parts")["step"]
    one = until(1, signal.SIGTERM, 2)
    two = until(one + 1, signal.SIGTERM, 0)
    assert 1 <= one < two <= 9
    again = run("--data", world, "--out", tmp_path / "parts", "--steps", 9, *more, nproc=2)
    assert f"at step {two} of 9" in again.stdout + again.stderr
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert a["step"] == b["step"] == 9 and [row["world"] for row in map(json.loads, open(tmp_path / "parts" / "log.jsonl")) if "world" in row] == [2, 1, 2]
    a, b = runs.read_log(tmp_path / "whole")["loss"], runs.read_log(tmp_path / "parts")["loss"]
    assert b[0] == list(range(1, 10)) and b[1] == pytest.approx(a[1], rel=0.01)       # nine steps of Adam on rounding


def test_checkpoint_of_other_settings_is_refused_and_a_broken_one_falls_back(world, tmp_path, capsys):
    train.main(["--data", str(world), "--out", str(tmp_path / "r"), "--steps", "2", "--save_every", "1", "--lr", "0.002", *SMALL])
    other = train.parse(["--out", str(tmp_path / "r"), "--steps", "2", "--lr", "0.5", "--ram", "0.1", *SMALL])      # less memory is no other run
    state, path = runs.read_checkpoint(tmp_path / "r")
    with pytest.raises(ValueError, match=r"ckpt.pt was trained with other settings \(lr 0.002 -> 0.5\)"):
        runs.check_settings(state, path, other)
    assert "lr 0.002 -> 0.5" in runs.check_settings(state, path, dataclasses.replace(other, change=True))
    with pytest.raises(ValueError, match="does not fit these settings"):
        train.main(["--data", str(world), "--out", str(tmp_path / "r"), "--steps", "2", "--queue", "9", "--change", "true", *SMALL])
    train.main(["--data", str(world), "--out", str(tmp_path / "r"), "--steps", "3", "--change", "true", "--lr_vision", "5", "--save_every", "1", *SMALL])
    assert weights_of(tmp_path / "r")["step"] == 3 and {g["factor"] for g in weights_of(tmp_path / "r")["optimizer"]["param_groups"]} == {5.0, 0.1, 1.0}
    (tmp_path / "r" / "ckpt.pt").write_bytes(b"cut off")
    assert weights_of(tmp_path / "r")["step"] == 2 and "trying the one before it" in capsys.readouterr().err
    (tmp_path / "r" / "ckpt_prev.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="ckpt.pt cannot be read .* and .*ckpt_prev.pt cannot be read"):
        runs.read_checkpoint(tmp_path / "r")


def test_what_is_not_finite_is_left_out_and_ten_in_a_row_stop_the_run(world, tmp_path, monkeypatch, capsys):
    calls, itm = [], losses.itm

    def broken(bad):
        calls.clear()

        def run(*x):
            calls.append(1)
            return itm(*x) * (float("nan") if len(calls) in bad else 1.0)
        monkeypatch.setattr(losses, "itm", run)
    main = lambda name, steps: train.main(["--data", str(world), "--out", str(tmp_path / name), "--steps", str(steps), "--save_every", "1", "--alpha", "0.4", "--queue", "30", *SMALL, "--log_every", "2"])
    broken({5})
    main("a", 5)
    last, before = weights_of(tmp_path / "a"), torch.load(tmp_path / "a" / "ckpt_prev.pt", weights_only=True)
    assert last["step"] == 5 and last["skipped"] == 1
    assert all(torch.equal(last["model"][k], before["model"][k]) for k in last["model"])          # batch norm's averages too
    assert all(torch.equal(x, before["optimizer"]["state"][i][k]) for i, state in last["optimizer"]["state"].items() for k, x in state.items())
    rows = runs.read_log(tmp_path / "a")
    assert rows["skipped"][1] == [0, 0, 1] and [x == x for x in rows["loss"][1]] == [True, True, False]      # steps 1-2, 3-4, and 5 alone
    broken(set(range(3, 99)))
    with pytest.raises(ValueError, match="10 steps in a row up to step 12"):
        main("b", 40)
    stopped = weights_of(tmp_path / "b")
    assert stopped["step"] == 12 and stopped["skipped"] == 10 and all(x.isfinite().all() for x in stopped["model"].values())
    broken(set())
    main("b", 40)
    assert weights_of(tmp_path / "b")["step"] == 40


# ---- many processes ---------------------------------------------------------------------------------------------------

DOUBLE = """
import sys; sys.path.insert(0, {root!r})
import torch
torch.set_default_dtype(torch.float64)
import train
train.main(sys.argv[1:])
"""


def test_two_processes_have_the_loss_curve_of_one(world, tmp_path):
    """50 steps, hand-over, momentum model and queue included. In double precision, so that what differs is not rounding: in single
    precision a change of the last digit of the weights alone moves the curve by some thousandths within fifty steps (dev/LOG.md)."""
    script = tmp_path / "double.py"
    script.write_text(DOUBLE.format(root=str(ROOT)))
    argv = ["--data", str(world), "--steps", "50", *SMALL, "--bags", "4", "--pairs", "1", "--alpha", "0.4", "--queue", "50"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = subprocess.Popen([sys.executable, script, *argv, "--out", tmp_path / "one"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    two = subprocess.run([*launch(2), script, *argv, "--out", tmp_path / "two"],
                         cwd=ROOT, env=env, capture_output=True, text=True)
    errors = one.communicate()[1]
    assert two.returncode == one.returncode == 0, two.stderr + errors
    a, b = runs.read_log(tmp_path / "one"), runs.read_log(tmp_path / "two")
    for name in ("loss", *train.LOSSES, "grad"):
        assert len(a[name][1]) == 50 and b[name][1] == pytest.approx(a[name][1], rel=1e-6, abs=1e-9), name


def test_one_dying_process_ends_the_others_and_says_why(world, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    bags = train.data.BagDataset(broken / "train")
    index = train.Batches(bags, None, train.parse(SMALL), 64, 1, 2)._at(2)             # the first bag of the second process
    offset, size = bags._spot[index, :2]
    with open(bags.shards[bags.shard_of[index]], "r+b") as f:
        f.seek(int(offset))
        f.write(bytes(int(size)))
    done = run("--data", broken, "--out", tmp_path / "x", "--steps", 20, *SMALL, "--workers", 1, nproc=2, check=False)
    assert done.returncode != 0 and re.search(rf"error \(process 1\): .*tar: bag {bags.keys[index]} is damaged .*: delete this shard", done.stderr), done.stderr


# ---- features of a frozen tower ----------------------------------------------------------------------------------------

def test_cached_training_equals_online_and_the_pass_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    main = lambda name, *more: train.main(["--data", str(folder), "--out", str(tmp_path / name), "--steps", "6", *SMALL, "--freeze_vision", "true", "--eval_every", "6", "--lr", "1e-4", *more])
    main("online", "--turns", "false", "--jitter", "0")
    replace, written = train.data.replace_file, []

    def dying(path, content):
        if path.suffix == ".npy":
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path)
        replace(path, content)
    monkeypatch.setattr(train.data, "replace_file", dying)
    with pytest.raises(KeyboardInterrupt):
        main("cached", "--cache", "true")
    first = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npy")}
    assert len(first) == 2
    monkeypatch.setattr(train.data, "replace_file", replace)
    main("cached", "--cache", "true")
    files = list(folder.rglob("*.npy"))
    assert len(files) == 8 and all(p.stat().st_mtime_ns == t for p, t in first.items())
    assert np.load(files[0], mmap_mode="r").shape[1:] == (85, 5, 128) and np.load(files[0], mmap_mode="r").dtype == np.float16
    a, b = runs.read_log(tmp_path / "online"), runs.read_log(tmp_path / "cached")
    for name in ("loss", *train.LOSSES, "val_loss"):
        assert b[name][1] == pytest.approx(a[name][1], rel=1e-3, abs=2e-3), name
    assert a["diagnosis_merged"] and (tmp_path / "cached" / "curves.png").stat().st_size > 5000
    shard = next((folder / "train").glob("bags-*.tar"))                               # tiled anew since: its features are another's
    os.utime(shard)
    main("cached", "--cache", "true", "--steps", "7", "--change", "true")
    assert [p.name.split(".")[0] for p in files if p.exists() and p.stat().st_mtime >= shard.stat().st_mtime] == [shard.stem]
    other = train.build_model(train.parse(["--seed", "1"]), train.text.Tokenizer.load(tmp_path / "cached" / "tokenizer.json"))
    assert train.features_name(other, "synthetic") not in files[0].name                            # other weights, other files


def test_the_log_goes_to_a_tracker_too(world, tmp_path, monkeypatch):
    sent = []
    stub = types.SimpleNamespace(init=lambda **k: types.SimpleNamespace(log=lambda row, step: sent.append((step, row)), **k))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train.main(["--data", str(world), "--out", str(tmp_path / "r"), "--steps", "2", "--wandb", "mine", *SMALL])
    assert [step for step, _ in sent] == [1, 2] and {"loss", "itc", "std", "grad", "lr", "bags_per_s", "patches_per_s", "wait", "mfu", "memory_gb", "skipped"} <= set(sent[0][1])
    first = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[0])
    assert first["config"]["bags"] == 4 and {"torch", "numpy", "python", "machine", "git", "world", "matmul_tflops"} <= set(first)
