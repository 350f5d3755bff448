"""The words of the lab in plain language, each with where it comes from: a paper or the module that defines it."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """A word, what it means here, and its source."""

    term: str
    meaning: str
    source: str


PAPERS = {
    "DDIM": "arXiv 2010.02502",
    "DDPM": "arXiv 2006.11239",
    "DepGraph (torch-pruning)": "arXiv 2301.12900",
    "Diff-Pruning": "arXiv 2305.10924",
    "MaskLLM": "arXiv 2409.17481",
    "MaskPro": "arXiv 2506.12876",
    "min-SNR": "arXiv 2303.09556",
    "NVIDIA 2:4": "arXiv 2104.08378",
    "SparseDM": "arXiv 2404.10445",
    "SR-STE": "arXiv 2102.04010",
    "Wanda": "arXiv 2306.11695",
}

TERMS = (
    Term(
        "activation",
        "A way to rank channels: the size of each weight times how strongly its input channel is used.",
        "Wanda, arXiv 2306.11695; prunedm/channel_scores.py",
    ),
    Term(
        "advantage",
        "In reinforce: how much better or worse a drawn mask did than the tracker expected.",
        "MaskPro, arXiv 2506.12876; prunedm/reinforce.py",
    ),
    Term(
        "alert",
        "What a run says by itself when masks stop varying too early or do not move at all, or a loss has risen to "
        "ten times its lowest or is no number any more; with what to do.",
        "prunedm/diagnostics.py, prunedm/stage_training.py",
    ),
    Term(
        "bake",
        "Write the masks into the weights: what a mask drops becomes zero, and the model needs no mask any more.",
        "prunedm/masked_unet.py",
    ),
    Term(
        "baseline",
        "A mask method that learns nothing (random, magnitude, Wanda, Fisher) or only follows the weights (SR-STE). A "
        "learned mask means something only beside one with the same budget of training.",
        "prunedm/mask_methods.py",
    ),
    Term(
        "channel group",
        "Channels that must go together because layers are connected, such as those of one residual stream.",
        "DepGraph, arXiv 2301.12900; prunedm/channel_groups.py",
    ),
    Term(
        "checkpoint",
        "All that the next step depends on, saved: a run goes on from it as if it had never stopped.",
        "prunedm/stage_training.py",
    ),
    Term(
        "compliance",
        "While masks learn: the share of groups with exactly N kept. In a saved file: the share of groups with at most "
        "N weights that are not zero.",
        "prunedm/pattern.py",
    ),
    Term(
        "DDIM",
        "A sampler that makes images in few steps and, with eta 0, draws no noise on the way.",
        "arXiv 2010.02502",
    ),
    Term(
        "DDPM",
        "The diffusion model that learns to predict noise, and its sampler, which draws noise in each step.",
        "arXiv 2006.11239",
    ),
    Term(
        "dense",
        "The model as it was before anything was removed; a layer without a mask; a pattern that keeps all.",
        "prunedm/records.py",
    ),
    Term("density", "The share of weights that is kept: 2:4 has density 0.5.", "prunedm/stage_recipes.py"),
    Term(
        "diff-pruning",
        "A way to rank channels by the loss's gradient, leaving out timesteps whose loss is small.",
        "Diff-Pruning, arXiv 2305.10924; prunedm/channel_scores.py",
    ),
    Term(
        "distillation",
        "Training that also pulls the model's prediction towards the dense model's.",
        "prunedm/training.py",
    ),
    Term(
        "eligible",
        "A layer that can carry the pattern: its input channels are a multiple of M, and it is not kept dense on "
        "purpose (first and last convolution, time embedding).",
        "prunedm/masked_unet.py",
    ),
    Term("EMA", "A running average of the weights, used in their place when a stage ends.", "prunedm/training.py"),
    Term(
        "entropy of the kept set",
        "How undecided a group's mask still is, in bits: 0 when it is settled, log2 of the number of possible masks "
        "when all are as likely.",
        "prunedm/masks.py",
    ),
    Term(
        "faithfulness",
        "How close a variant's images are to the dense model's of the same seeds: SSIM, PSNR and feature distance.",
        "prunedm/faithfulness.py",
    ),
    Term(
        "FD-fashion",
        "The Frechet distance in the features of the bundled classifier of garments. Not to be compared with a FID.",
        "prunedm/extractors.py",
    ),
    Term("FID", "The Frechet distance in the features of Inception-v3, and in no others.", "prunedm/extractors.py"),
    Term(
        "Fisher",
        "A way to rank weights: the weight squared times the mean of its squared gradient.",
        "arXiv 1801.05787; prunedm/importance.py",
    ),
    Term(
        "flip",
        "A group whose top-N mask differs from the initial mask; flips are their share.",
        "prunedm/diagnostics.py",
    ),
    Term(
        "flip budget",
        "The share of groups that a first drawn mask is expected to change; it sets where the logits start.",
        "MaskPro, arXiv 2506.12876; prunedm/stage_recipes.py",
    ),
    Term(
        "Frechet distance",
        "How far apart two sets of images are: the distance of two normal distributions fitted to their features. It "
        "falls as images are added, so compare it only at the same number of images. Lower is better.",
        "prunedm/metrics.py",
    ),
    Term(
        "group",
        "M weights side by side along a layer's input channels, for one output channel and one kernel position.",
        "NVIDIA 2:4, arXiv 2104.08378; prunedm/pattern.py",
    ),
    Term(
        "gumbel",
        "A mask method: draw masks with noise, use the hard mask forward and a soft one for the gradient, while a "
        "temperature falls.",
        "MaskLLM, arXiv 2409.17481; prunedm/learn.py",
    ),
    Term(
        "Gumbel top-N",
        "How a mask is drawn: add noise to the logits and keep the N largest of each group. Every drawn mask is N:M.",
        "MaskPro, arXiv 2506.12876; prunedm/masks.py",
    ),
    Term(
        "inception score",
        "How sure a classifier is of each image and how varied the classes are together: from 1 to the number of "
        "classes. Higher is better.",
        "prunedm/metrics.py",
    ),
    Term(
        "initial mask (m0)",
        "The mask that learning begins with, and against which flips are counted.",
        "MaskPro, arXiv 2506.12876; prunedm/mask_stage.py",
    ),
    Term(
        "interrupted",
        "The process that worked on the run is gone without a word; Resume goes on from the last checkpoint.",
        "prunedm/owner.py",
    ),
    Term(
        "KID",
        "The kernel distance in Inception-v3's features (in others it is called KD): unbiased at any number of images. "
        "Lower is better.",
        "prunedm/metrics.py",
    ),
    Term(
        "latency",
        "The measured time of one UNet call, on the device, number type and batch size that stand beside it.",
        "prunedm/latency.py",
    ),
    Term(
        "logits",
        "One number a weight that learning moves: the N largest of each group are kept.",
        "MaskPro, arXiv 2506.12876; prunedm/masks.py",
    ),
    Term(
        "loss-aware importance",
        "Training draws timesteps with a large loss more often and weighs them less, so that the goal stays the same.",
        "arXiv 2102.09672; prunedm/diffusion.py",
    ),
    Term(
        "MACs",
        "Multiplications with addition that one image costs at dense arithmetic. The figure for N:M hardware stands "
        "apart, and is theoretical.",
        "prunedm/records.py",
    ),
    Term(
        "magnitude",
        "A way to rank weights or channels: by their size.",
        "prunedm/importance.py, prunedm/channel_scores.py",
    ),
    Term("mask", "For each weight of a layer: kept or dropped.", "prunedm/masked_unet.py"),
    Term(
        "min-SNR",
        "A weighting of the loss over timesteps that stops growing where there is little noise.",
        "min-SNR, arXiv 2303.09556; prunedm/diffusion.py",
    ),
    Term(
        "noise floor",
        "The same figures between two sets that do not differ (the dense model from other seeds, two sets of real "
        "images): smaller differences mean nothing.",
        "prunedm/metrics.py",
    ),
    Term(
        "offset",
        "A mask method for training beside the weights: a learned correction to magnitude.",
        "prunedm/learn.py",
    ),
    Term(
        "packed file",
        "One safetensors file that stores kept weights only, with a few bits a group that say which.",
        "prunedm/packed.py",
    ),
    Term(
        "Pareto front",
        "The models that no other one beats in both of two figures.",
        "prunedm/comparison.py",
    ),
    Term(
        "pattern (N:M)",
        "Of every M weights N are kept: 2:4, 1:4, 2:8...",
        "NVIDIA 2:4, arXiv 2104.08378; prunedm/stage_recipes.py",
    ),
    Term(
        "paused",
        "The run holds between two steps, its checkpoint saved; it keeps its memory and goes on at once when told to.",
        "prunedm/pipeline.py",
    ),
    Term(
        "position balance",
        "How evenly the kept weights fall over the M positions of a group; as one figure, 1 is even.",
        "prunedm/diagnostics.py",
    ),
    Term(
        "precision and recall",
        "The share of generated images that lie among the real ones in feature space, and the share of real ones that "
        "lie among the generated.",
        "prunedm/metrics.py",
    ),
    Term(
        "PSNR",
        "How little pixels differ from the dense model's image, in dB. Higher is closer.",
        "prunedm/faithfulness.py",
    ),
    Term("recipe", "The whole configuration of a run as one YAML document.", "prunedm/recipe.py"),
    Term(
        "recover",
        "Training with the masks frozen, before they are baked in.",
        "prunedm/stages.py",
    ),
    Term(
        "reinforce",
        "A mask method that needs no gradient through the model: draw a mask, see whether the loss falls or rises, and "
        "make such masks more or less likely.",
        "MaskPro, arXiv 2506.12876; prunedm/reinforce.py",
    ),
    Term(
        "residual",
        "In reinforce: the loss under a drawn mask less the loss under the reference mask, on the same images, "
        "timesteps and noise.",
        "MaskPro, arXiv 2506.12876; prunedm/reinforce.py",
    ),
    Term("run", "One recipe at work, or done, and the folder that holds all of it.", "prunedm/store.py"),
    Term(
        "same seeds",
        "The same place in two pictures grew from the same noise, so that differences are the models' own.",
        "prunedm/samples.py",
    ),
    Term(
        "semi-structured kernels",
        "PyTorch's own code for 2:4: for CUDA GPUs, matrices only, in fp16, bf16 or int8.",
        "prunedm/semi_structured.py",
    ),
    Term(
        "sensitivity",
        "How much the loss grows when one layer alone is masked; a budget of weights is spent by it.",
        "prunedm/allocate.py",
    ),
    Term(
        "SR-STE",
        "A mask method that keeps the largest weights of each group anew in each step, while all of them train.",
        "SR-STE, arXiv 2102.04010; prunedm/mask_methods.py",
    ),
    Term(
        "SSIM",
        "How alike two images are in structure, from -1 to 1.",
        "Wang et al. 2004, doi 10.1109/TIP.2003.819861; prunedm/faithfulness.py",
    ),
    Term(
        "stage",
        "A part of a run: prune, fine-tune, learn masks, recover, evaluate, report.",
        "prunedm/records.py",
    ),
    Term(
        "structured",
        "The variant after stage 1: whole channels are gone, and the model is smaller and faster everywhere.",
        "prunedm/structured.py",
    ),
    Term(
        "Taylor",
        "A way to rank channels: each weight times the loss's gradient in it.",
        "arXiv 1906.10771; prunedm/channel_scores.py",
    ),
    Term(
        "temperature",
        "How soft the choice of gumbel and offset is: high explores, low decides.",
        "MaskLLM, arXiv 2409.17481; prunedm/learn.py",
    ),
    Term(
        "tensor-core ready",
        "A layer whose sizes NVIDIA's sparse tensor cores take for 2:4: output channels a multiple of 8, input "
        "channels of 16.",
        "prunedm/pattern.py",
    ),
    Term(
        "timestep",
        "How much noise is in an image: 0 is clean. Sampling begins at the noisy end.",
        "DDPM, arXiv 2006.11239; prunedm/diffusion.py",
    ),
    Term("timestep bin", "A tenth of the timesteps, the cleanest first.", "prunedm/diffusion.py"),
    Term(
        "top probability",
        "The probability of a group's likeliest weight, averaged over groups: it rises as masks settle.",
        "prunedm/diagnostics.py",
    ),
    Term(
        "tracker",
        "In reinforce: the running mean of the residual in a timestep bin. Below zero, drawn masks beat the reference.",
        "MaskPro, arXiv 2506.12876; prunedm/reinforce.py",
    ),
    Term(
        "uniform layout",
        "Stage 1 with one width a resolution level: the result is an ordinary UNet2DModel that plain diffusers loads.",
        "prunedm/uniform.py",
    ),
    Term(
        "validation loss",
        "The error of predicting noise on held-out images, at fixed timesteps and noise. Lower is better.",
        "prunedm/diffusion.py",
    ),
    Term("variant", "One of a run's three models: dense, structured, N:M.", "prunedm/records.py"),
    Term(
        "Wanda",
        "A way to rank weights: the size of a weight times how strongly its input is used.",
        "Wanda, arXiv 2306.11695; prunedm/importance.py",
    ),
)


def find(words: str) -> list[Term]:
    """The terms in which every one of these words occurs, whatever its case; all of them for no words."""
    wanted = words.casefold().split()
    return [term for term in TERMS if all(word in " ".join(term).casefold() for word in wanted)]
