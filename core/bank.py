"""Many adapters on one model: switched without moving a number, and each row of a batch with its own.

Of a matrix the A of all adapters lie on each other and their B beside each other, so that one product serves them all:
h = W0·x + b + B·(gains ⊙ (A·x)), where a row's gains are 0 for the adapters that it does not use. A row may use
several at once, each at a strength of its own: then it runs their weighted sum.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.adapter import Adapter
from core.errors import LoRAError, listed, quoted
from core.inject import places_of, replace
from core.matrices import Factors, as_matrix, dense_weight, matrix_form
from core.packing import join_magnitudes, join_slices
from core.targets import lora_layers
from core.wrapper import StandIn

Row = str | None | Mapping[str, float]
"""What a row of a batch runs: an adapter by its name, None for the base, or name → strength of several."""


class AdapterBank:
    """Adapters on a model whose weights they share, for inference.

    Attributes:
        names: The adapters, in their order.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Puts `adapters` beside the weights of `model`; at first it computes what it did.

        Args:
            model: The base model, not adapted.
            adapters: Name → adapter of linear layers, slices of fused projections, or embeddings.

        Raises:
            LoRAError: There is no adapter, the model is adapted already, or an adapter holds what rows cannot have
                for themselves: convolutions, experts, or parameters trained in full.
            AdapterFileError: An adapter does not fit the model; the model is left as it was.
        """
        if not adapters:
            raise LoRAError("`adapters` must hold at least one adapter, by name.")
        if lora_layers(model):
            raise LoRAError("`model` must not be adapted already; call eject(model) first.")
        for name, adapter in adapters.items():
            _check(name, adapter, model)
        self.names = tuple(adapters)
        self._model = model
        self._chosen = _Chosen(self.names)
        self._banked: dict[str, tuple[list[str], _Banked]] = {}
        self._arrange({name: _updates(adapter) for name, adapter in adapters.items()})

    def add(self, name: str, adapter: Adapter) -> None:
        """Puts one more adapter beside the others, which are not loaded anew; all rows run the base until `use`.

        Raises:
            LoRAError: The name is taken, or the adapter holds what rows cannot have for themselves.
            AdapterFileError: The adapter does not fit the model; the bank is left as it was.
        """
        if name in self.names:
            raise LoRAError(f"`name` (={quoted(name)}) must be new to the bank; remove that adapter first.")
        self._lift()
        try:
            _check(name, adapter, self._model)  # against the model's own layers
            updates = _updates(adapter)
        except LoRAError:
            self._lower()
            raise
        self.names = (*self.names, name)
        self._arrange({name: updates})

    def remove(self, name: str) -> None:
        """Takes an adapter out; all rows run the base until `use`.

        Raises:
            LoRAError: There is no adapter of that name.
        """
        if name not in self.names:
            raise LoRAError(f"`name` (={quoted(name)}) must be of the bank: {', '.join(self.names) or 'it is empty'}.")
        self._lift()
        self.names = tuple(other for other in self.names if other != name)
        self._arrange({})

    def _arrange(self, new: Mapping[str, Mapping[str, "_Update"]]) -> None:
        """Puts layers in the places of the model's own, which stand there now, with what they had and `new`."""
        self._chosen.rename(self.names)
        by_path: dict[str, dict[str, _Update]] = {path: {} for path in self._banked}
        for name, updates in new.items():
            for path, update in updates.items():
                by_path.setdefault(path, {})[name] = update
        places = places_of(self._model) if by_path.keys() - self._banked.keys() else {}
        for path, updates in by_path.items():
            if path not in self._banked:
                module = self._model.get_submodule(path)
                self._banked[path] = places[module], _Banked(module, self._chosen)
            self._banked[path][1].arrange(self.names, updates)
        self._banked = {path: banked for path, banked in self._banked.items() if banked[1].names}
        self._counts = Counter(name for _, banked in self._banked.values() for name in banked.names)
        self._lower()

    def _lift(self) -> None:
        for paths, banked in self._banked.values():
            replace(self._model, paths, banked.base_layer)

    def _lower(self) -> None:
        for paths, banked in self._banked.values():
            replace(self._model, paths, banked)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What runs now: one entry for all rows of a batch, or one for each."""
        return self._chosen.rows

    def num_matrices(self, name: str) -> int:
        """Returns how many matrices of the model an adapter changes where it is chosen; 0 for one that is not here."""
        return self._counts.get(name, 0)

    def use(self, *rows: Row) -> None:
        """Chooses what runs from now on. No number moves: a single adapter is a matter of which views are read.

        Args:
            rows: One for all rows of a batch, or one for each of its rows.

        Raises:
            LoRAError: There is no adapter of that name, or a strength is no finite number.
        """
        self._chosen.choose(rows)

    def eject(self) -> None:
        """Gives the model its own layers back, as the same objects."""
        self._lift()
        self._banked, self._counts = {}, Counter()


class _Chosen:
    """What the layers of a bank look up at each forward pass.

    Attributes:
        single: The one adapter that all rows use at strength 1, or None.
        is_base: Whether no row uses any.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.rename(names)

    def rename(self, names: tuple[str, ...]) -> None:
        """Takes the adapters that there are now; what was chosen is forgotten."""
        self._names = names
        self.choose((None,))

    def choose(self, rows: tuple[Row, ...]) -> None:
        if rows == (None,):
            self.rows, self.single, self.is_base, self._gains = rows, None, True, None
            return
        if len(rows) == 1 and isinstance(rows[0], str) and rows[0] in self._names:
            self.rows, self.single, self.is_base, self._gains = rows, rows[0], False, None
            return
        if not rows:
            raise LoRAError("`rows` must say what runs: one entry for all rows of a batch, or one for each.")
        gains = torch.zeros(len(rows), len(self._names))
        for i, row in enumerate(rows):
            for name, value in ({} if row is None else {row: 1.0} if isinstance(row, str) else row).items():
                if name not in self._names:
                    raise LoRAError(
                        f"`rows` (={quoted(name)}) must name adapters of the bank: {', '.join(self._names)}."
                    )
                gains[i, self._names.index(name)] = value
        if not bool(torch.isfinite(gains).all()):
            raise LoRAError("`rows` must have strengths that are finite numbers.")
        self.rows, self.single, self.is_base, self._gains = rows, None, not bool(gains.any()), gains
        self._columns: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def columns(self, ranks: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns (rows, sum of ranks): each row's gain on each direction; kept until the choice changes."""
        key = ranks, like.device, like.dtype
        if key not in self._columns:
            assert self._gains is not None
            spread = self._gains.repeat_interleave(torch.tensor(ranks), dim=1)
            self._columns[key] = spread.to(like.device, like.dtype)
        return self._columns[key]


class _Update:
    """ΔW·x = B·A·x + diagonal ⊙ (W0·x): the scaling is in B, and so is DoRA's gain, which also stretches W0's rows."""

    def __init__(self, factors: Factors, magnitude: Tensor | None) -> None:
        self.A, self.B, self.magnitude = factors.A, factors.B * factors.scaling, magnitude

    def on(self, base_layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns A, B and the diagonal; W0 is needed for DoRA's."""
        if self.magnitude is None:
            return self.A, self.B, None
        W = as_matrix(base_layer, dense_weight(base_layer)).to(self.B.dtype)
        norms = torch.linalg.vector_norm(W + self.B.to(W.device) @ self.A.to(W.device), dim=1)
        gain = self.magnitude.to(norms) / norms
        return self.A, self.B * gain[:, None].to(self.B.device), gain - 1


class _Banked(StandIn):
    """A layer with the updates of a bank beside it."""

    def __init__(self, base_layer: nn.Module, chosen: _Chosen) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._chosen = chosen
        self._is_embedding = matrix_form(base_layer) == "embedding"
        self._one: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}

    @property
    def names(self) -> set[str]:
        """The adapters that have an update here."""
        return set(self._one)

    def arrange(self, names: tuple[str, ...], new: Mapping[str, _Update]) -> None:
        """Lays the updates of those of `names` that have one here on each other: what is here already, and `new`."""
        parts = self._one | {name: update.on(self.base_layer) for name, update in new.items()}
        own = [name for name in names if name in parts]
        self._one = {}
        if not own:
            return
        reference = next(iter(self.base_layer.parameters()))
        device, dtype = reference.device, reference.dtype if reference.is_floating_point() else torch.bfloat16
        self._ranks = tuple(parts[name][0].shape[0] if name in parts else 0 for name in names)
        self._A = torch.cat([parts[name][0].to(device, dtype) for name in own])
        self._B = torch.cat([parts[name][1].to(device, dtype) for name in own], 1)
        zeros = torch.zeros(len(self._B), device=device, dtype=dtype)
        found = [parts[name][2] if name in parts else None for name in names]
        is_plain = all(d is None for d in found)
        self._diagonals = None if is_plain else torch.stack([zeros if d is None else d.to(zeros) for d in found])
        end = 0
        for place, (name, r) in enumerate(zip(names, self._ranks, strict=True)):
            begin, end = end, end + r
            if name in parts:
                diagonal = None if self._diagonals is None or found[place] is None else self._diagonals[place]
                self._one[name] = self._A[begin:end], self._B[:, begin:end], diagonal

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the base layer does, with each row's own update."""
        h = self.base_layer(x)
        chosen = self._chosen
        if chosen.is_base:
            return h
        if chosen.single is not None:
            one = self._one.get(chosen.single)
            return h if one is None else self._added(h, x, *one)
        if x.shape[0] != len(chosen.rows) and len(chosen.rows) > 1:
            raise LoRAError(
                f"`rows` (={len(chosen.rows)} of them) must be as many as the rows of the batch (={x.shape[0]}), "
                "or one for all."
            )
        gains = chosen.columns(self._ranks, self._A)
        diagonals = self._diagonals
        if diagonals is not None:
            diagonals = chosen.columns((1,) * len(diagonals), diagonals) @ diagonals
        return self._added(h, x, self._A, self._B, diagonals, gains)

    def _added(
        self, h: Tensor, x: Tensor, A: Tensor, B: Tensor, diagonal: Tensor | None, gains: Tensor | None = None
    ) -> Tensor:
        low = F.embedding(x, A.T) if self._is_embedding else F.linear(x, A.to(x.dtype))
        if gains is not None:
            low = low * _by_row(gains, low)
        update = F.linear(low, B.to(low.dtype)).to(h.dtype)
        if diagonal is None:
            return update.add_(h)
        bias = getattr(self.base_layer, "bias", None)
        stretched = h if bias is None else h - bias
        return h + update + stretched * _by_row(diagonal, h).to(h.dtype)


def _check(name: str, adapter: Adapter, model: nn.Module) -> None:
    """Raises unless rows of a batch can have this adapter for themselves, and it fits the model."""
    forms = {f.layout.form for f in adapter.factors.values()} - {"linear", "slice", "embedding"}
    others = sorted(forms) + (["parameters trained in full"] if adapter.trained_in_full else [])
    if others:
        raise LoRAError(
            f"`adapters[{name!r}]` (with {listed(others)}) must be of linear layers, slices and embeddings, to run "
            "beside others; put it on a model of its own by Adapter.apply."
        )
    adapter.check_fit(model)


def _updates(adapter: Adapter) -> dict[str, _Update]:
    """Returns path of a module → its update; the slices of a fused projection as one."""
    wholes, _ = join_slices(adapter.factors)
    magnitudes = join_magnitudes(adapter.factors, adapter.magnitudes, adapter.row_norms)
    return {path: _Update(f, magnitudes.get(path)) for path, f in wholes.items()}


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """Returns (rows, n) or (n) values so that they go with (rows, …, n)."""
    return values.view(len(values), *(1 for _ in like.shape[1:-1]), -1) if values.dim() == 2 else values
