"""Teach a text tower and the fusion to read captions before any image, where there is no QuiltNet.

    python -m prepare.words DATA --out DATA/words.pt    # reads DATA/train

The paper starts from a text tower that has read a million captions. From nothing, text and images
learn together badly: kinds that the images cannot tell apart yet become one in the text too, and
then no gradient is left to part them (dev/LOG.md). train.py --init FILE takes the result.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import model as networks
import text

# The networks that are trained. `kind` stays as it was drawn, but the fusion has learned with it.
TRAINED = ("text.", "fuse_text.", "fusion.", "fusion_norm.", "lm_dense.", "lm_norm.", "lm_head.")


def draw_pairs(rng, of_slide, bags, captions):
    """Draw two captions of each magnification from up to 32 slides -> two lists of M captions.

    of_slide: lists of bag numbers, a slide each. A pair is left out where a bag has no caption.
    """
    pairs = []
    for slide in rng.permutation(len(of_slide))[:32]:
        for level in range(4):
            pair = []
            for i in rng.choice(of_slide[slide], 2):
                said = captions[bags.keys[i]]
                nodes = np.flatnonzero((data.LEVEL == level) & np.asarray(bags.valid[i]))
                told = [said[node] for node in nodes if said[node]]
                pair += [told[rng.choice(len(told))]] if told else []
            if len(pair) == 2:
                pairs.append(pair)
    return [first for first, _ in pairs], [second for _, second in pairs]


def next_word_loss(model, text_tokens, ids):
    """Predict each next word of ids [M, T] through the fusion without an image (PLM)."""
    real = networks.real_tokens(ids, model.text.end)
    prefix = torch.ones_like(ids[:, 0])
    no_image = text_tokens.new_zeros(len(ids), 0, model.kind.shape[1])
    fused = model.fuse_with_text(no_image, text_tokens, real, prefix)
    return losses.plm(model.lm_logits(fused), ids, prefix, real, real[:, 0])


def learn(model, bags, captions, tokenizer, steps=200, seed=0, lr=3e-3):
    """Train the text tower, the fusion and the word head of an MRPLIP on captions alone.

    Two captions of the same slide and magnification attract, all others repel. bags: .slides,
    .keys, .valid [n, 85]; captions[key]: 85 of str or None.
    """
    of_slide = {}
    for i, slide in enumerate(bags.slides):
        of_slide.setdefault(slide, []).append(i)
    of_slide = list(of_slide.values())
    if len(of_slide) < 2:
        raise ValueError("words are learned from the captions of at least 2 slides: add slides")
    # Spare biases, norms and positions from weight decay.
    groups = [{"params": [], "weight_decay": 0.02}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if name.startswith(TRAINED):
            spared = p.ndim < 2 or name.endswith("positional_embedding")
            groups[spared]["params"].append(p)
    trained = groups[0]["params"] + groups[1]["params"]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(seed)
    warmup = steps // 10
    for step in data.progress(range(steps), "words", unit="step"):
        first, second = draw_pairs(rng, of_slide, bags, captions)
        ids = tokenizer.batch(first + second, model.text.context)
        ids = text.trim(ids, tokenizer.end).to(model.proj.weight.device)
        text_tokens, pooled = model.text(ids)  # [2M, T, Dt], [2M, d]
        # Each caption finds its partner among all others, in both directions.
        a, b = losses.unit(pooled).chunk(2)  # [M, d]
        logits = a @ b.T / 0.07  # [M, M]
        own = torch.arange(len(a), device=a.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        # Every third caption is spoken. Every fourth would be of one magnification only.
        loss = loss + next_word_loss(model, text_tokens[::3], ids[::3])
        # Warm up, then follow a cosine from lr to lr / 100.
        progress = max(0, step - warmup) / max(1, steps - warmup)
        rate = lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (step + 1) / warmup if step < warmup else rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    # Clear the gradients of all, because the loss reaches more than it trains.
    model.zero_grad()


def write_words(folder, out, steps=200, vocab=1500, size="synthetic", seed=0):
    """Learn from folder/train and write {"tokenizer": merges, "model": {name: tensor}} by torch."""
    bags = data.Bags(Path(folder) / "train")
    captions = text.Captions(bags.folder)
    if not captions.files:
        raise ValueError(f"{bags.folder} holds no captions: make them by prepare.captions")
    # The captions of 5,000 bags are enough for a tokenizer.
    spoken = (caption for key in bags.keys[:5000] for caption in captions[key] if caption)
    tokenizer = text.Tokenizer.train(spoken, vocab)
    torch.manual_seed(seed)
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **networks.SIZES[size])
    learn(model, bags, captions, tokenizer, steps, seed)
    named = model.named_parameters()
    weights = {name: p.detach() for name, p in named if name.startswith((*TRAINED, "kind"))}
    content = {"tokenizer": tokenizer.merges, "model": weights}
    with data.lock(Path(out).parent, ".words.lock", wait=True):
        data.write_whole(Path(out), lambda file: torch.save(content, file))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("data", metavar="DATA", help="folder with train/: shards and captions")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=200, help="%(default)s")
    parser.add_argument("--vocab", type=int, default=1500, help="of the tokenizer (%(default)s)")
    parser.add_argument("--size", choices=networks.SIZES, default="synthetic", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    args = parser.parse_args()
    write_words(args.data, args.out, args.steps, args.vocab, args.size, args.seed)


if __name__ == "__main__":
    data.run_script(main, "nothing is kept; the same command starts again")
