"""Describe pictures in words: a caption, and the keywords closest to each picture.

    python -m protocols.caption RUN a.png b.png
    python -m protocols.caption RUN a.png --prefix "the tumour shows" --top-p 0.9 --seed 1

A picture is one patch at a magnification that the run was trained on. The run must have seen
captions; it says what it has learnt to say, in lower case.

[1] Holtzman et al. 2020: nucleus sampling (top-p).
"""

import argparse
import sys
from pathlib import Path

import torch

import data
import evaluate
import model as networks
from protocols.embed import Tiles


@torch.no_grad()
def describe(model, tokenizer, images, prefix="", max_tokens=64, top_p=0.0, generator=None):
    """Caption images [N, 3, S, S] in [0, 1] -> list of N str, each beginning with `prefix`.

    top_p 0 takes the likeliest token each time; else one is drawn from the fewest tokens that
    together have probability top_p [1]. A caption ends at its end token, after max_tokens, or
    where the text tower ends. ValueError if the prefix leaves no room. The model is in eval mode.
    """
    # Begin all captions with the start token and the prefix.
    start = torch.tensor([tokenizer.start, *tokenizer.encode(prefix)], device=images.device)
    known, context = len(start), model.text.context
    if known >= context:
        has = f"the prefix has {known - 1} tokens"
        raise ValueError(f"{has} and the text tower reads {context}: shorten it")
    ids = start.repeat(len(images), 1)  # [N, T]
    # Encode the pictures once; encode the words anew for each word, which is cheap enough to read.
    image_tokens = model.to_fusion(model.vision_tokens(images))  # [N, V, D]
    while ids.shape[1] < min(context, known + max_tokens):
        ended = (ids == tokenizer.end).any(1, keepdim=True)  # [N, 1]
        if ended.all():
            break
        # Read picture and words under the prefix mask; the last position predicts the next word.
        valid = networks.real_tokens(ids, tokenizer.end)
        prefixes = torch.full_like(ids[:, 0], known)
        fused = model.fuse_with_text(image_tokens, model.text(ids)[0], valid, prefixes)
        logits = model.lm_logits(fused[:, -1]).float()  # [N, vocab]
        # Training never asks for these two.
        logits[:, [tokenizer.start, tokenizer.mask]] = -torch.inf
        word = logits.argmax(1, keepdim=True)  # [N, 1]
        if top_p:
            # Draw from the fewest words that reach top_p: those before which the sum is below it.
            p, order = logits.softmax(1).sort(descending=True)
            likely = p * (p.cumsum(1) - p < top_p)
            word = order.gather(1, torch.multinomial(likely, 1, generator=generator))
        # A caption that has ended repeats its end.
        ids = torch.cat([ids, torch.where(ended, tokenizer.end, word)], 1)
    return [tokenizer.decode(row) for row in ids.tolist()]


def print_captions(run, paths, prefix="", top_p=0.0, best=5, seed=0):
    """Print a caption and the `best` closest keywords of each picture -> how many failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = evaluate.load_run(run, device)
    generator = torch.Generator(device).manual_seed(seed)
    listed = Path(run) / "keywords.json"
    keywords = data.read_json(listed) if listed.exists() else []
    if keywords:
        w = evaluate.embed_texts(model, tokenizer, keywords)  # [K, d]
    failed = 0
    for path, found in zip(paths, Tiles(paths, model.vision.size), strict=True):
        # A bad file costs one picture.
        if isinstance(found, str):
            print(f"error: {found}", file=sys.stderr)
            failed += 1
            continue
        image = found[0].to(device) / 255  # [1, 3, S, S]
        caption = describe(model, tokenizer, image, prefix, top_p=top_p, generator=generator)[0]
        print(f"{path}\n  {data.one_line(caption)}")
        if keywords:
            v = evaluate.embed_images(model, image)["image_embedding"]
            cosine, which = (v @ w.T)[0].topk(min(best, len(keywords)))
            pairs = zip(which.tolist(), cosine.tolist(), strict=True)
            print("  " + ", ".join(f"{keywords[i]} {c:.2f}" for i, c in pairs))
    return failed


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("run", metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("pictures", nargs="+", metavar="PNG", help="patches: PNG, JPEG, TIFF")
    parser.add_argument("--prefix", default="", help="words that the captions begin with")
    parser.add_argument("--top-p", type=float, default=0.0, help="draw words; 0: the likeliest (0)")
    parser.add_argument("--seed", type=int, default=0, help="of --top-p (0)")
    args = parser.parse_args()
    if not 0 <= args.top_p <= 1:
        raise ValueError(f"--top-p is a probability between 0 and 1, not {args.top_p}")
    failed = print_captions(args.run, args.pictures, args.prefix, args.top_p, seed=args.seed)
    if failed:
        raise ValueError(f"{failed} of {len(args.pictures)} pictures could not be read, see above")


if __name__ == "__main__":
    data.run_script(main, "the captions above are complete")
