"""What the methods put into a model: adapter layers after others, and trained tokens before and within rows."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import LoRAError
from core.rows import IGNORED
from core.wrapper import StandIn


class Bottleneck(nn.Module):
    """An adapter layer: x + up(f(down(norm(x)))), d → r → d, with biases; `norm` is a LayerNorm or nothing.

    `up` starts at zero, so that a model with adapters gives at first exactly what it gives without; `down` starts
    as LoRA's A does. Houlsby et al. 2019, arXiv:1902.00751, §2, draw both from a normal distribution of σ = 0.01
    instead, and start near the base. All is float32 whatever the base's type; the product runs in the type of x.
    """

    def __init__(
        self,
        d: int,
        r: int,
        *,
        activation: str,
        has_norm: bool = False,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        """Makes one.

        Args:
            d: Features of x.
            r: Those in between.
            activation: f: "relu" or "gelu".
            has_norm: Whether x is normalized first, by a LayerNorm that is trained, too.
            device: Where its parameters lie.
            generator: Source of random numbers, on the CPU.
        """
        super().__init__()
        self._activation = {"relu": F.relu, "gelu": F.gelu}[activation]
        if torch.device(device).type == "meta":
            down = torch.empty(r, d, device=device)
        else:
            down = torch.empty(r, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator).to(device)
        self.down_weight, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(r, device=device))
        self.up_weight = nn.Parameter(torch.zeros(d, r, device=device))
        self.up_bias = nn.Parameter(torch.zeros(d, device=device))
        self.norm_weight = nn.Parameter(torch.ones(d, device=device)) if has_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(d, device=device)) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns like x, (…, d)."""
        h = x
        if self.norm_weight is not None and self.norm_bias is not None:
            h = F.layer_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))
        h = self._activation(F.linear(h, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype)))
        return x + F.linear(h, self.up_weight.to(x.dtype), self.up_bias.to(x.dtype))


class WithAdapter(StandIn):
    """A layer and an adapter after it; of a layer that gives several things, after the first."""

    def __init__(self, base_layer: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer gives, the first of it adapted."""
        found = self.base_layer(*args, **kwargs)
        return (self.adapter(found[0]), *found[1:]) if isinstance(found, tuple) else self.adapter(found)


class SpecialTokens(NamedTuple):
    """Trained tokens that are in no vocabulary: their numbers follow on those of the vocabulary.

    Attributes:
        first: The number of the first one: how many tokens the model has.
        num_prefix: So many stand before each row.
        num_infix: So many stand between its prompt and its answer: before its first trained token.
    """

    first: int
    num_prefix: int
    num_infix: int

    def around(self, prompt: list[int]) -> list[int]:
        """Returns a prompt to be answered, with them."""
        middle, end = self.first + self.num_prefix, self.first + self.num_prefix + self.num_infix
        return [*range(self.first, middle), *prompt, *range(middle, end)]

    def within(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a batch whose rows have them, (batch, num_prefix + seq + num_infix); none of them is predicted.

        What comes first in a row is not predicted from them either, as without them, so that the same tokens are
        trained.

        Raises:
            LoRAError: The batch has more than ids, mask and labels, of which nobody says what it is for these tokens.
        """
        ids, labels = batch["input_ids"], batch["labels"].clone()
        others = batch.keys() - {"input_ids", "attention_mask", "labels"}
        if others:
            raise LoRAError(
                f"`batches` (with {', '.join(sorted(others))}) must have input_ids, attention_mask and labels alone "
                "for a prefix; leave the rest out."
            )
        labels[:, 0] = IGNORED
        num_rows, seq = ids.shape
        cut = (labels != IGNORED).int().argmax(1, keepdim=True)  # of a row that trains nothing: 0
        numbers = torch.arange(seq, device=ids.device).expand(num_rows, seq)
        places = numbers + self.num_prefix + self.num_infix * (numbers >= cut)
        special = torch.arange(self.num_prefix + self.num_infix, device=ids.device).expand(num_rows, -1)
        their_places = special + cut * (special >= self.num_prefix)

        def spread(own: Tensor, theirs: Tensor) -> Tensor:
            room = own.new_empty(num_rows, seq + special.shape[1])
            return room.scatter_(1, places, own).scatter_(1, their_places, theirs.to(own.dtype))

        spreads = {
            "input_ids": spread(ids, special + self.first),
            "labels": spread(labels, torch.full_like(special, IGNORED)),
        }
        if "attention_mask" in batch:
            spreads["attention_mask"] = spread(batch["attention_mask"], torch.ones_like(special))
        return spreads


def special_tokens_of(model: nn.Module) -> SpecialTokens | None:
    """Returns the trained tokens that a model was given; None where it has none."""
    return model.__dict__.get("_lora_special_tokens")


class WithPrefix(StandIn):
    """An embedding that knows the special tokens, too, and what becomes of them after each layer.

    Attributes:
        prefix: (layers, tokens, d), what stands for the special tokens where each layer begins; with one "layer",
            what their embeddings are, from which the model goes on by itself.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        num_layers: int,
        num_tokens: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draws them from a normal distribution with the standard deviation of the embedding's own entries."""
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        shape, device = (num_layers, num_tokens, weight.shape[1]), torch.device(device or weight.device)
        if device.type == "meta":
            prefix = torch.empty(shape, device=device)
        else:
            sigma = weight.detach().float().std().item()
            prefix = (sigma * torch.randn(shape, generator=generator)).to(device)
        self.prefix = nn.Parameter(prefix)
        self._first = base_layer.num_embeddings
        self._at: tuple[Tensor, Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Returns (batch, seq, d) for (batch, seq) numbers of tokens."""
        number = ids - self._first
        is_special = (number >= 0).unsqueeze(-1)
        self._at = is_special, number.clamp_min(0)
        return self.put(self.base_layer(ids.masked_fill(number >= 0, 0)), 0)

    def put(self, hidden: Tensor, layer: int) -> Tensor:
        """Returns what a layer begins with: `hidden`, but for the special tokens, which are as they are trained."""
        assert self._at is not None
        is_special, number = self._at
        return torch.where(is_special, self.prefix[layer][number].to(hidden.dtype), hidden)


class Prefixed(StandIn):
    """A layer of the model in which the special tokens begin as they are trained, whatever became of them below."""

    def __init__(self, base_layer: nn.Module, owner: WithPrefix, layer: int) -> None:
        super().__init__()
        self.base_layer, self._layer = base_layer, layer
        object.__setattr__(self, "_owner", owner)  # not a child: its parameters are the embedding's

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer gives."""
        owner: WithPrefix = self.__dict__["_owner"]
        return self.base_layer(owner.put(hidden_states, self._layer), *args, **kwargs)
