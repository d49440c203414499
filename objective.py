"""How the six losses hang on the networks, in the paper's order: the whole method on one page.

                 patches -> v, visual tokens        captions -> t, tokens        keywords -> w
    ITC          v with t of all patches of all processes, and of earlier ones from a queue
    ITM MLM PLM  fusion(visual tokens, caption) of some patches
    CVTA         v with the keywords of its bag that it selects
    MRTVA        z = fusion(visual tokens, the same keywords), parents with children

ITC, MLM and PLM may have their targets softened by a momentum model, a slow copy of the networks.

Shape letters: B bags, N nodes per bag, M patches that the caption losses read, U distinct keywords, K keywords of a bag, k_o selected
per node, T text tokens, V visual tokens of the fusion, D its width, d the shared space.

References: [1] MR-PLIP, CVPR 2025, section 3.   [2] Li et al. 2021, ALBEF.   [6] He et al. 2020, MoCo.
"""
import contextlib
import copy

import torch
import torch.nn as nn

import losses
from model import text_valid

# ----------------------------------------------------------------------------------------------------------------------
# The momentum model [2, 6]: a slow copy of whatever is distilled. Its weights are the mean of the past ones, its answers steadier.

def slow_copy(model, without=()):
    """A copy of an MRPLIP that no gradient reaches. without: modules it does not need, which are not copied."""
    return copy.deepcopy(model, {id(part): nn.Identity() for part in without}).requires_grad_(False)


@torch.no_grad()
def follow(slow, model, m):
    """slow <- m slow + (1 - m) model, for every parameter that slow has: a module cannot be forgotten."""
    fast = dict(model.named_parameters())
    names, old = zip(*slow.named_parameters())
    torch._foreach_lerp_(old, [fast[name] for name in names], 1 - m)


# ----------------------------------------------------------------------------------------------------------------------
# The objective: a module, so that DDP and torch.compile see one forward call a step. It also holds what the losses remember, the
# momentum model and the queues.

class Objective(nn.Module):
    """batch (as train.Batches builds it, images already cut to patches) -> (dict of losses, dict of monitors).

    cfg is train.Config. What a weight of 0, alpha 0 or queue 0 switches off is neither built nor computed."""

    def __init__(self, model, cfg):
        super().__init__()
        self.model, self.cfg, self.slow = model, cfg, None
        self.softens = cfg.alpha > 0 and bool(cfg.itc or cfg.mlm or cfg.plm)
        words = cfg.alpha > 0 and (cfg.mlm or cfg.plm)
        if self.softens or cfg.itc and cfg.queue or (cfg.cvta or cfg.mrtva) and cfg.cvta_select == "ema":
            spared = [model.heads, model.itm_head, model.fuse_keyword] + [model.vision] * cfg.freeze_vision
            self.slow = slow_copy(model, spared + ([] if words else [model.fuse_image, model.fuse_text, model.fusion, model.fusion_ln, model.lm_dense, model.lm_ln]))
        if cfg.itc and cfg.queue:
            d, device = model.proj.out_features, model.proj.weight.device
            self.register_buffer("queue_v", model.proj.weight.new_zeros(cfg.queue, d))
            self.register_buffer("queue_t", model.proj.weight.new_zeros(cfg.queue, d))
            self.register_buffer("queue_bag", torch.full((cfg.queue,), -1, device=device))
            self.register_buffer("queue_at", torch.zeros((), dtype=torch.long, device=device))

    def memory(self):
        """What a checkpoint needs besides the model: state dict of the momentum model and the queues."""
        return {k: x for k, x in self.state_dict().items() if not k.startswith("model.")}

    def follow(self):
        """After an optimiser step: the momentum model follows. Half of it is forgotten every `half_life` bags, on any number of processes."""
        if self.slow is not None:
            follow(self.slow, self.model, 0.5 ** (self.cfg.bags / self.cfg.half_life))

    def forward(self, patches, batch):
        """patches [B, N, 3, S, S], batch a dict -> ({loss: scalar}, {monitor: scalar})."""
        model, slow, cfg, out = self.model, self.slow, self.cfg, {}
        valid, ids = batch["valid"], batch["ids"].flatten(0, 1)                        # [B, N], [BN, T]
        B, N = valid.shape
        bag = batch["bag"].repeat_interleave(N)                                        # [BN] number of the bag in the data
        # Every magnification weighs the same, however many nodes it has: otherwise 40x would be three quarters of the loss.
        sizes = losses.level_sizes(N, cfg.children)
        weight = valid / torch.tensor([s for s in sizes for _ in range(s)], device=valid.device)       # [B, N]
        alpha = batch["alpha"] if self.softens else None

        # Towers: every patch, every caption and every distinct keyword once.
        with torch.no_grad() if cfg.freeze_vision else contextlib.nullcontext():
            tokens = model.vision(patches.flatten(0, 1))                               # [BN, 1 + P, Dv]
        v = model.project(tokens)                                                      # [BN, d]
        captions, pooled = model.text(ids)                                             # [BN, T, Dt], [BN, d]
        t = losses.unit(pooled)
        if cfg.cvta or cfg.mrtva:
            w = model.encode_text(batch["keywords"])[batch["bag_of"]]                  # [U, d] -> [B, K, d]
        if slow is not None:
            with torch.no_grad():
                slow_tokens = tokens if cfg.freeze_vision else slow.vision(patches.flatten(0, 1))
                slow_v, (slow_captions, pooled) = slow.project(slow_tokens), slow.text(ids)
                slow_t = losses.unit(pooled)
        tau_itc, tau_cvta = (-model.itc_scale).exp(), (-model.cvta_scale).exp()
        monitor = {"tau": tau_itc.detach()}

        if cfg.itc:
            queue = (self.queue_v, self.queue_t, self.queue_bag) if cfg.queue else None
            out["itc"] = losses.itc(v, t, bag, tau_itc, weight.flatten(), cfg.kin, (slow_v, slow_t) if queue or self.softens else None, queue, alpha)
            if queue:  # for the batches to come: this one's features stand in its own columns
                for slots, rows in zip(queue, (slow_v, slow_t, torch.where(valid.flatten(), bag, -1))):
                    losses.enqueue(slots, self.queue_at, rows)
                self.queue_at.copy_((self.queue_at + B * N * losses.world_size()) % cfg.queue)
                monitor["queue"] = (self.queue_bag >= 0).float().mean()
        visual = model.visual_tokens(tokens) if cfg.itm or cfg.mlm or cfg.plm or cfg.mrtva else None     # [BN, V, D] shared by all passes

        # Caption losses on M = B * pairs patches.
        row = batch["pairs"]                                                           # [M] numbers into BN
        image, caption, word = (visual[row], captions[row], ids[row]) if visual is not None else (None,) * 3
        real, ok = text_valid(ids[row], model.text.end), valid.flatten()[row]          # [M, T], [M]
        soft_mlm = soft_plm = None
        if self.softens and (cfg.mlm or cfg.plm):
            with torch.no_grad():
                slow_image = slow.visual_tokens(slow_tokens[row])                      # [M, V, D]
        if cfg.itm:
            i, j, found = losses.hard_negatives(v[row], t[row], bag[row], tau_itc, ok)
            seen = torch.cat([real, real, real[j]])                                    # [3M, T]
            fused = model.fuse_with_text(torch.cat([image, image[i], image]), torch.cat([caption, caption, caption[j]]), seen,
                                         at=seen.sum(1) - 1)                           # [3M, D] read at the end id
            out["itm"] = losses.itm(*model.itm_head(fused).chunk(3), ok & found)              # [M, 2] each
        if cfg.mlm:
            special = (model.text.end - 1, model.text.end, model.text.end + 1)         # start, end, mask
            masked, labels = losses.corrupt(word, real & ok[:, None], special[2], special, model.lm_bias.numel())
            if self.softens:
                with torch.no_grad():
                    soft_mlm = slow.lm_logits(slow.fuse_with_text(slow_image, slow.text(masked)[0], real))
            out["mlm"] = losses.mlm(model.lm_logits(model.fuse_with_text(image, model.text(masked)[0], real)), labels, soft_mlm, alpha)
        if cfg.plm:
            prefix = losses.split_prefix(real)
            if self.softens:
                with torch.no_grad():
                    soft_plm = slow.lm_logits(slow.fuse_with_text(slow_image, slow_captions[row], real, prefix))
            out["plm"] = losses.plm(model.lm_logits(model.fuse_with_text(image, caption, real, prefix)), word, prefix, real, ok, soft_plm, alpha)
        if not (cfg.cvta or cfg.mrtva):
            return out, monitor

        # The paper's own: one selection of keywords serves CVTA and E_mm. Nodes hand over one by one from the keywords of their own
        # caption to what similarity selects: untrained projections would only confirm their first choice.
        v, by = v.view(B, N, -1), (v.view(B, N, -1), w)                                # [B, N, d]
        if cfg.cvta_select == "ema":
            with torch.no_grad():
                by = slow_v.view(B, N, -1), slow.encode_text(batch["keywords"])[batch["bag_of"]]
        index, chosen = losses.select_keywords(*by, cfg.k_o, batch["w_valid"], batch["own"] | batch["free"][..., None])    # [B, N, k_o]
        if cfg.cvta:
            out["cvta"] = losses.cvta(v, w, cfg.k_o, tau_cvta, weight, batch["w_valid"], (index, chosen), batch["word"] if cfg.cvta_negatives == "batch" else None, losses.NEAR)
            monitor["tau_cvta"] = tau_cvta.detach()
        if cfg.mrtva:
            picked = w.gather(1, index.flatten(1)[..., None].expand(-1, -1, w.shape[-1])).view(B * N, cfg.k_o, -1)   # [BN, k_o, d]
            z = model.fuse_with_keywords(visual, picked, chosen.flatten(0, 1))         # [BN, D]
            h, g = (x.view(B, N, -1) for x in model.heads(z, valid.flatten()))
            out["mrtva"] = losses.mrtva(h, g.detach(), valid, cfg.children, cfg.mrtva_pairs)  # stop-gradient on the target [1, SimSiam]
            monitor.update(losses.monitors(g, valid, index, chosen, batch["own"], batch["w_valid"]))
            some = torch.arange(min(16, B * N), device=v.device) * (B * N // 16 | 1) % (B * N)         # a few nodes of all levels and many bags
            with torch.no_grad():
                swapped = model.fuse_with_keywords(visual[some.roll(-1)], picked[some], chosen.flatten(0, 1)[some])
            monitor["blind"] = losses.blindness(z[some], swapped, valid.flatten()[some])
        return out, monitor
