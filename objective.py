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
import torch.nn.functional as F

import losses
from batches import augment
from model import text_valid


def take(x, index):
    """x[index], any shapes. But where an index repeats, the gradient of that is added up by several threads in whatever order they come, and
    two runs would differ in their last bits; that of an embedding is not (on a CPU; compiled for a GPU it is added up in any order, too)."""
    return F.embedding(index, x.flatten(1)).view(*index.shape, *x.shape[1:])


# ----------------------------------------------------------------------------------------------------------------------
# The objective: a module, so that DDP and torch.compile see one forward call a step. It also holds what the losses remember, the
# momentum model and the queues.

class Objective(nn.Module):
    """batch (as batches.Batches builds it) -> (dict of losses, dict of monitors). All chance is in the batch: there is none here.

    cfg is train.Config. What a weight of 0, alpha 0 or queue 0 switches off is not computed, and of the momentum model not built."""

    def __init__(self, model, cfg):
        super().__init__()
        self.model, self.cfg, self.slow = model, cfg, None
        self.softens = cfg.alpha > 0 and bool(cfg.itc or cfg.mlm or cfg.plm)
        if self.softens or cfg.itc and cfg.queue or (cfg.cvta or cfg.mrtva) and cfg.cvta_select == "ema":
            spared = [model.heads, model.itm_head, model.fuse_keyword] + [model.vision] * cfg.freeze_vision
            if not (cfg.alpha and (cfg.mlm or cfg.plm)):
                spared += [model.fuse_image, model.fuse_text, model.fusion, model.fusion_ln, model.lm_dense, model.lm_ln, model.lm_head]
            # The momentum model [2, 6] is the model, without what it does not need. Nothing in it asks for gradients, so nothing it says has any.
            self.slow = copy.deepcopy(model, {id(part): nn.Identity() for part in spared}).requires_grad_(False)
        if cfg.itc and cfg.queue:
            d, device = model.proj.out_features, model.proj.weight.device
            self.register_buffer("queue_v", model.proj.weight.new_zeros(cfg.queue + 1, d))
            self.register_buffer("queue_t", model.proj.weight.new_zeros(cfg.queue + 1, d))
            self.register_buffer("queue_bag", torch.full((cfg.queue + 1,), -1, device=device))
            self.register_buffer("queue_at", torch.zeros((), dtype=torch.long, device=device))
        self.train()

    def train(self, mode=True):
        """As nn.Module, but a frozen tower stays in eval mode: its batch norms, where it has any, keep their averages."""
        super().train(mode)
        if self.cfg.freeze_vision:
            self.model.vision.eval()
        return self

    def memory(self):
        """What a checkpoint needs besides the model: state dict of the momentum model and the queues."""
        return {k: x for k, x in self.state_dict().items() if not k.startswith("model.")}

    @torch.no_grad()
    def follow(self):
        """After an optimiser step: slow <- m slow + (1 - m) model, for every parameter that slow has, so that no module is forgotten. Half of
        it is gone every `half_life` bags, on any number of processes."""
        if self.slow is not None:
            fast, m = dict(self.model.named_parameters()), 0.5 ** (self.cfg.bags / self.cfg.half_life)
            names, old = zip(*self.slow.named_parameters())
            torch._foreach_lerp_(old, [fast[name] for name in names], 1 - m)

    def flops(self, batch):
        """Matrix-multiplication FLOPs of the networks for this batch on this process, forward and backward, from shapes alone: what is
        trained costs three forward passes (two where nothing before it learns), what is frozen or slow costs one."""
        cfg, (B, N, T), (U, Tk), M = self.cfg, batch["ids"].shape, batch["keywords"].shape, len(batch["pairs"])
        f, words, nodes = self.model.flops(T, cfg.k_o), U * self.model.flops(Tk)["text"], B * N
        itm, mlm, plm, mrtva, keywords = (bool(x) for x in (cfg.itm, cfg.mlm, cfg.plm, cfg.mrtva, cfg.cvta or cfg.mrtva))
        told = M * (f["fuse_with_text"] + f["lm_logits"])                              # one pass of language modelling
        both = told * (mlm + plm) + M * f["text"] * mlm
        learns = nodes * f["text"] + words * keywords + 3 * M * f["match"] * itm + both + nodes * (f["fuse_with_keywords"] + f["heads"]) * mrtva
        reads = nodes * f["project"] + f["visual_tokens"] * (nodes if mrtva else M * (itm or mlm or plm))
        sees, slow = nodes * f["vision"] * ("tokens" not in batch), 0
        if self.slow is not None:
            slow = nodes * f["project"] + sees * (not cfg.freeze_vision) + words * (cfg.cvta_select == "ema")
            slow += nodes * f["text"] * (self.softens or bool(cfg.itc and cfg.queue)) + (M * f["visual_tokens"] * (mlm or plm) + both) * self.softens
        return 3 * learns + (2 if cfg.freeze_vision else 3) * reads + (sees if cfg.freeze_vision or not sees else 3 * sees - nodes * f["pixels"]) + slow

    def forward(self, batch):
        """batch -> ({loss: scalar}, {monitor: scalar}). The batch holds

        pixels  [B, 3, 8S, 8S] uint8 bags, to be cut at nodes [B, N], where there is one in window [B, 3], or [B, N, 3, S, S] in [0, 1], patches;
                turns [B] and stain [B, 2, 3] where they are to be turned and stained.   Or tokens [B, N, V, Dv], cached features
        valid   [B, N] bool   not blank, magnification present       ids   [B, N, T]   caption of each node
        bag     [B]    number of the bag in the data: kin have equal ones
        pairs   [M]    the nodes, of B N, that ITM, MLM and PLM read; uniform numbers for their draws, lot_mask [M, 3, context + 1],
                lot_prefix [M], lot_negative [M, 2]
        keywords [U, T] every distinct keyword once       bag_of  [B, K]  which of them a bag's keywords are
        word    [B, K] a number for each keyword, equal where keywords are       w_valid [B, K] bool  not padding
        own     [B, N, K] bool   a node's own caption names the keyword
        free    [B, N] bool      the node may select others (the hand-over)       alpha  0-d  weight of the momentum model's opinion"""
        model, slow, cfg, out = self.model, self.slow, self.cfg, {}
        valid, ids = batch["valid"], batch["ids"].flatten(0, 1)                        # [B, N], [BN, T]
        B, N = valid.shape
        bag = batch["bag"].repeat_interleave(N)                                        # [BN] number of the bag in the data
        # A node weighs 1 / the nodes of its magnification in a bag: otherwise 40x would be three quarters of the loss.
        sizes = losses.level_sizes(N, cfg.children)
        weight = valid * torch.cat([torch.full((s,), 1 / s, device=valid.device) for s in sizes])      # [B, N]
        alpha = batch["alpha"] if self.softens else None

        # Towers: every patch, every caption and every distinct keyword once.
        if "tokens" in batch:
            tokens = batch["tokens"].flatten(0, 1)                                     # [BN, V, Dv]
        else:
            images = augment(batch, cfg.jitter).flatten(0, 1)                          # [BN, 3, S, S]
            with torch.no_grad() if cfg.freeze_vision else contextlib.nullcontext():
                tokens = model.see(images)                                             # [BN, V, Dv]
        v = model.project(tokens)                                                      # [BN, d]
        captions, pooled = model.text(ids)                                             # [BN, T, Dt], [BN, d]
        t = losses.unit(pooled)
        if cfg.cvta or cfg.mrtva:
            w = take(model.encode_text(batch["keywords"]), batch["bag_of"])            # [U, d] -> [B, K, d]
        if slow is not None:
            slow_tokens = tokens if cfg.freeze_vision else slow.see(images)
            slow_v = slow.project(slow_tokens)
            if self.softens or cfg.itc and cfg.queue:
                slow_captions, slow_pooled = slow.text(ids)
                slow_t = losses.unit(slow_pooled)
        tau_itc, tau_cvta = (-model.itc_scale).exp(), (-model.cvta_scale).exp()
        monitor = {"tau": tau_itc.detach()}

        if cfg.itc:
            queue = (self.queue_v, self.queue_t, self.queue_bag) if cfg.queue else None
            out["itc"] = losses.itc(v, t, bag, tau_itc, weight.flatten(), cfg.kin, (slow_v, slow_t) if queue or self.softens else None, queue, alpha)
            if queue and self.training:  # after the loss: before it, a patch would stand in the queue as well as in its own column
                losses.enqueue(queue, self.queue_at, slow_v, slow_t, bag, valid.flatten())
            if queue:
                monitor["queue"] = (self.queue_bag >= 0).float().sum() / cfg.queue

        # Caption losses on M = B * pairs patches.
        row = batch["pairs"]                                                           # [M] numbers into BN
        caption, row_ids, ok = take(captions, row), ids[row], valid.flatten()[row]      # [M, T, Dt], [M, T], [M]
        real = text_valid(row_ids, model.text.end)                                     # [M, T]
        if cfg.mrtva:
            visual = model.visual_tokens(tokens)                                       # [BN, V, D] for all passes
            image = take(visual, row)                                                  # [M, V, D]
        elif cfg.itm or cfg.mlm or cfg.plm:
            image = model.visual_tokens(take(tokens, row))
        soft_mlm = soft_plm = None
        if self.softens and (cfg.mlm or cfg.plm):
            slow_image = slow.visual_tokens(slow_tokens[row])                          # [M, V, D]
        if cfg.itm:
            i, j, found = losses.hard_negatives(v[row], t[row], bag[row], tau_itc, ok, batch["lot_negative"])
            images_, captions_, real_ = (losses.gather(x) for x in (image, caption, real))   # of all processes: i and j count these rows
            seen = torch.cat([real, real, real_[j]])                                   # [3M, T]
            fused = model.fuse_with_text(torch.cat([image, take(images_, i), image]), torch.cat([caption, caption, take(captions_, j)]), seen,
                                         at=seen.sum(1) - 1)                           # [3M, D] read at the end id
            out["itm"] = losses.itm(*model.itm_head(fused).chunk(3), ok & found)       # [M, 2] each
        if cfg.mlm:
            special = (model.text.end - 1, model.text.end, model.text.end + 1)         # start, end, mask
            masked, labels = losses.corrupt(row_ids, real & ok[:, None], special[2], special, batch["lot_mask"])
            if self.softens:
                soft_mlm = slow.lm_logits(slow.fuse_with_text(slow_image, slow.text(masked)[0], real))
            out["mlm"] = losses.mlm(model.lm_logits(model.fuse_with_text(image, model.text(masked)[0], real)), labels, soft_mlm, alpha)
        if cfg.plm:
            prefix = losses.split_prefix(real, batch["lot_prefix"])
            if self.softens:
                soft_plm = slow.lm_logits(slow.fuse_with_text(slow_image, slow_captions[row], real, prefix))
            out["plm"] = losses.plm(model.lm_logits(model.fuse_with_text(image, caption, real, prefix)), row_ids, prefix, real, ok, soft_plm, alpha)
        if not (cfg.cvta or cfg.mrtva):
            return out, monitor

        # The paper's own: one selection of keywords serves CVTA and E_mm. At first nodes choose among the keywords of their own
        # caption, then more and more of them (`free`, drawn at each step) among all: untrained projections would only confirm their first choice.
        v = v.view(B, N, -1)                                                           # [B, N, d]
        choose_v, choose_w = v, w
        if cfg.cvta_select == "ema":
            choose_v, choose_w = slow_v.view(B, N, -1), slow.encode_text(batch["keywords"])[batch["bag_of"]]
        index, chosen = losses.select_keywords(choose_v, choose_w, cfg.k_o, batch["w_valid"], batch["own"] | batch["free"][..., None])    # [B, N, k_o]
        if cfg.cvta:
            word = batch["word"] if cfg.cvta_negatives == "batch" else None
            bound = batch["own"] & ~batch["free"][..., None]                           # [B, N, K] named by the caption of a node that may choose no others
            out["cvta"] = losses.cvta(v, w, cfg.k_o, tau_cvta, weight, batch["w_valid"], (index, chosen), word, losses.NEAR, bound)
            monitor["tau_cvta"] = tau_cvta.detach()
        if cfg.mrtva:
            picked = w.gather(1, index.flatten(1)[..., None].expand(-1, -1, w.shape[-1])).view(B * N, cfg.k_o, -1)   # [BN, k_o, d]
            z = model.fuse_with_keywords(visual, picked, chosen.flatten(0, 1))         # [BN, D]
            h, g = (x.view(B, N, -1) for x in model.heads(z, valid.flatten()))
            out["mrtva"] = losses.mrtva(h, g.detach(), valid, cfg.children, cfg.mrtva_pairs)  # stop-gradient on the target [1, SimSiam]
            monitor.update(losses.monitors(g, valid, index, chosen, batch["own"], batch["w_valid"]))
            some = torch.cat([torch.arange(4, device=v.device) * B // 4 * N + sum(sizes[:i]) for i in range(len(sizes))])   # four bags at each level
            with torch.no_grad():
                swapped = model.fuse_with_keywords(visual[some.roll(-1)], picked[some], chosen.flatten(0, 1)[some])
            monitor["blind"] = losses.blindness(z[some], swapped, valid.flatten()[some])
        return out, monitor
