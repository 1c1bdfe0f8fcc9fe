"""Which method trains a model: LoRA, or one that its paper compares it with; each setting declared once."""

from dataclasses import dataclass
from typing import Literal

from core.declarations import Config, setting

METHODS = {
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "bitfit": "BitFit",
    "head": "Head only",
    "last_layers": "Last layers only",
    "adapter_h": "Adapter_H",
    "adapter_l": "Adapter_L",
    "adapter_p": "Adapter_P",
    "prefix_embed": "Prefix-embedding",
    "prefix_layer": "Prefix-layer",
}
"""Ways to train a model, as the paper calls them (Hu et al. 2021, arXiv:2106.09685, §5.1)."""

_ADAPTERS, _PREFIXES = ("adapter_h", "adapter_l", "adapter_p"), ("prefix_embed", "prefix_layer")


@dataclass(frozen=True)
class MethodConfig(Config):
    """What of a model is trained: LoRA, or one of the methods that its paper compares it with (`core.baselines`).

    Where the methods come from:

        bitfit: Ben Zaken et al. 2021, arXiv:2106.10199.
        last_layers: Li and Liang 2021, arXiv:2101.00190, FT-top2.
        adapter_h: Houlsby et al. 2019, arXiv:1902.00751.
        adapter_l: Lin et al. 2020, arXiv:2004.03829.
        adapter_p: Pfeiffer et al. 2021, arXiv:2005.00247.
        prefix_embed, prefix_layer: Li and Liang 2021, in the form of Hu et al. 2021, arXiv:2106.09685, §5.1.
    """

    method: Literal[
        "lora",
        "full",
        "bitfit",
        "head",
        "last_layers",
        "adapter_h",
        "adapter_l",
        "adapter_p",
        "prefix_embed",
        "prefix_layer",
    ] = setting(
        "lora",
        "Method",
        "LoRA, or what its paper compares it with: those leave the matrices chosen in Model unused, and have no "
        "spectrum, no merging and no export. Full fine-tuning wants about a tenth of LoRA's learning rate.",
        choices=METHODS,
        why="LoRA paper, §5.1",
    )
    bottleneck: int = setting(
        16,
        "Bottleneck",
        "Width r of each adapter, d → r → d. The paper takes 8 to 64. Wider costs memory; too narrow learns "
        "too little.",
        minimum=1,
        maximum=100_000,
        only=_ADAPTERS,
        why="LoRA paper, app. D",
    )
    num_layers: int = setting(
        2,
        "Layers",
        "How many of the last layers are trained; 2 in the paper. More learn more, and need more memory.",
        minimum=1,
        maximum=100_000,
        only=("last_layers",),
        why="LoRA paper, §5.1",
    )
    prefix_length: int = setting(
        8,
        "Prefix (tokens)",
        "Trained tokens before each row. They count in the longest row, and in the context. 8 to 256; the paper's get "
        "worse above 256, or above 32 in each layer.",
        minimum=0,
        maximum=100_000,
        only=_PREFIXES,
        why="LoRA paper, §5.5",
    )
    infix_length: int = setting(
        8,
        "Infix (tokens)",
        "Trained tokens between prompt and answer; 8 in the paper. They count like the prefix.",
        minimum=0,
        maximum=100_000,
        only=_PREFIXES,
        why="LoRA paper, app. D",
    )

    @property
    def title(self) -> str:
        """What people call the method."""
        return METHODS[self.method]

    @property
    def num_special_tokens(self) -> int:
        """How many trained tokens a row has besides its own."""
        return self.prefix_length + self.infix_length if self.method in _PREFIXES else 0

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights are trained, so that their type is that of what is learned."""
        return self.method in ("full", "bitfit", "head", "last_layers")

    def further_problems(self) -> list[str]:
        if self.method in _PREFIXES and not self.num_special_tokens:
            return ["`prefix_length` (=0) and `infix_length` (=0) must be above 0 together: else nothing is trained"]
        return []
