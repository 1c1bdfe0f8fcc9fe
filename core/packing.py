"""Slices, experts and groups, joined to the one pair of A and B that PEFT's files have of a whole, and taken apart."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import AdapterFileError, quoted
from core.matrices import Factors, Layout

# PEFT's files do not say in what order a module has its stacks of experts: this is the one of transformers' models.
PLACES = {"gate_up_proj": 0, "up_proj": 0, "down_proj": 1}


def join_slices(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Returns the factors with the slices of each projection as one, and how to take them apart again.

    The A of all slices lie on each other, their B stand block by block in the rows that are theirs.
    """
    joined: dict[str, Factors] = {}
    slices: dict[str, Any] = {}
    for whole, paths in grouped(factors, "slice").items():
        parts = [factors[path] for path in paths]
        if parts[0].layout.form != "slice":
            joined[whole] = parts[0]
            continue
        scaling, num_rows = parts[0].scaling, parts[0].layout.num_rows
        B = torch.zeros(num_rows, sum(f.r for f in parts))
        column = 0
        for f in parts:
            factor = f.scaling / scaling
            B[f.layout.rows, column : column + f.r] = f.B if factor == 1 else f.B * factor
            column += f.r
        layout = Layout(transposed=parts[0].layout.transposed)
        joined[whole] = Factors(torch.cat([f.A for f in parts]), B, scaling, layout)
        slices[whole] = [
            {"name": path.rpartition(".")[2], "r": f.r, "scaling": f.scaling, "rows": _runs(f.layout.rows)}
            for path, f in zip(paths, parts, strict=True)
        ]
    return joined, slices


def as_whole(f: Factors) -> Factors:
    """Returns the update of a slice as one of its whole projection, which is 0 in the other rows."""
    B = f.B.new_zeros(f.layout.num_rows, f.r)
    B[f.layout.rows] = f.B
    return Factors(f.A, B, f.scaling, Layout(transposed=f.layout.transposed))


def join_magnitudes(
    factors: Mapping[str, Factors], magnitudes: Mapping[str, Tensor], row_norms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns path → magnitude; those of slices among the lengths of W0's rows, as ΔW is 0 in the other rows."""
    joined: dict[str, Tensor] = {}
    for whole, paths in grouped(factors, "slice").items():
        paths = [path for path in paths if path in magnitudes]
        if whole in paths:
            joined[whole] = magnitudes[whole]
        elif paths:
            if whole not in row_norms:
                raise AdapterFileError(
                    f"`dora` (=True) on slices of {whole} needs the lengths of W0's other rows to be written; "
                    "take the adapter out of its model by Adapter.from_model."
                )
            joined[whole] = row_norms[whole].clone()
            for path in paths:
                joined[whole][factors[path].layout.rows] = magnitudes[path]
    return joined


def join_experts(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Returns the factors with the experts of each stack as one, and how to take them apart again.

    PEFT keeps one A and one B a stack, all of one r: A's rows lie expert by expert, B's columns direction by
    direction. It wraps the module once for each stack, the first of them innermost.
    """
    joined: dict[str, Factors] = {}
    notes: dict[str, Any] = {}
    for stack, paths in grouped(factors, "expert").items():
        first = factors[paths[0]]
        if first.layout.form != "expert":
            joined[stack] = first
            continue
        parts = {int(path.rpartition(".")[2]): factors[path] for path in paths}
        num_experts, r = first.layout.num_experts, max(f.r for f in parts.values())
        A, B = torch.zeros(num_experts, r, first.shape[1]), torch.zeros(first.shape[0], r, num_experts)
        for index, f in parts.items():
            factor = f.scaling / first.scaling
            A[index, : f.r] = f.A
            B[:, : f.r, index] = f.B if factor == 1 else f.B * factor
        joined[stack] = Factors(A.flatten(0, 1), B.flatten(1), first.scaling, first.layout)
        notes[stack] = {
            "place": first.layout.place,
            "experts": [{"index": index, "r": f.r, "scaling": f.scaling} for index, f in parts.items()],
        }
    for stack, note in notes.items():
        module = stack.rpartition(".")[0]
        outside = [n for s, n in notes.items() if s.rpartition(".")[0] == module and n["place"] > note["place"]]
        note["under"] = module + ".base_layer" * len(outside)
    return joined, notes


def grouped(factors: Mapping[str, Factors], form: str) -> dict[str, list[str]]:
    """Returns path → the paths of its parts of that form; of what is none, its own alone."""
    groups: dict[str, list[str]] = {}
    for path, f in factors.items():
        groups.setdefault(path.rpartition(".")[0] if f.layout.form == form else path, []).append(path)
    return groups


def _runs(rows: Tensor | None) -> list[list[int]]:
    """Returns rising numbers as runs [first, last + 1]."""
    numbers = [] if rows is None else rows.tolist()
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return runs


def slices_apart(whole: str, joined: Factors, parts: list[dict[str, Any]]) -> dict[str, Factors]:
    """Returns the path of each slice → its factors; the opposite of `join_slices`.

    Raises:
        ValueError: A slice has rows that the whole has not.
    """
    found, column = {}, 0
    for part in parts:
        r, scaling = int(part["r"]), float(part["scaling"])
        if not all(0 <= a <= b <= joined.B.shape[0] for a, b in part["rows"]):
            raise ValueError(f"a slice of {whole} with rows {quoted(part['rows'])}, of {joined.B.shape[0]}")
        rows = torch.cat([torch.arange(a, b) for a, b in part["rows"]])
        columns = slice(column, column + r)
        B = joined.B[rows, columns]
        factor = scaling / joined.scaling
        layout = Layout("slice", rows=rows, num_rows=joined.B.shape[0], transposed=joined.layout.transposed)
        found[f"{whole}.{part['name']}"] = Factors(joined.A[columns], B if factor == 1 else B / factor, scaling, layout)
        column += r
    return found


def experts_apart(stack: str, joined: Factors, r: int, note: dict[str, Any] | None) -> dict[str, Factors]:
    """Returns the path of each expert → its factors; the opposite of `join_experts`, or of what PEFT made."""
    num_experts, odd = divmod(joined.r, r)
    if odd:
        raise ValueError(f"`r` of {stack} (={r}) must go into the {joined.r} rows of its A")
    if note is None and num_experts == 1 and stack.endswith(".weight"):  # no stack, but a layer's weight by its name
        return {stack.removesuffix(".weight"): joined}
    place = PLACES.get(stack.rpartition(".")[2], 0)
    note = note or {"place": place, "experts": [{"index": i, "r": r} for i in range(num_experts)]}
    A, B = joined.A.unflatten(0, (num_experts, r)), joined.B.unflatten(1, (r, num_experts))
    layout = Layout("expert", num_experts=num_experts, place=int(note["place"]))
    found = {}
    for part in note["experts"]:
        index, own = int(part["index"]), int(part["r"])
        scaling = float(part.get("scaling", joined.scaling))
        factor = scaling / joined.scaling
        own_B = B[:, :own, index].contiguous()
        found[f"{stack}.{index}"] = Factors(A[index, :own], own_B if factor == 1 else own_B / factor, scaling, layout)
    return found


def join_groups(f: Factors) -> Tensor:
    """Returns A of a convolution as a kernel of PEFT's, (groups · r, in_channels, k, …).

    There A reads all channels and only B has groups; so A stands once for each group, in the channels that it has.
    """
    A, groups = f.A.view(f.r, *f.layout.kernel), f.layout.groups
    if groups == 1:
        return A
    width = A.shape[1]
    whole = A.new_zeros(groups * f.r, groups * width, *A.shape[2:])
    for group in range(groups):
        whole[group * f.r : (group + 1) * f.r, group * width : (group + 1) * width] = A
    return whole


def groups_apart(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Returns A (r, in_channels / groups, k, …) and B (out, r) of what PEFT's layer with groups computes.

    None where some group reads what is another's, which a kernel of a convolution with groups cannot do. Where each
    group has an A of its own, they lie on each other, and r is the file's.
    """
    if A.shape[1] % groups or B.shape[0] % groups:
        return None
    r, width = A.shape[0] // groups, A.shape[1] // groups
    blocks = A.unflatten(0, (groups, r)).unflatten(2, (groups, width))
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if blocks.count_nonzero() != own.count_nonzero():
        return None
    if all(torch.equal(one, own[0]) for one in own):
        return own[0], B
    apart, size = B.new_zeros(B.shape[0], groups * r), B.shape[0] // groups
    for group in range(groups):
        apart[group * size : (group + 1) * size, group * r : (group + 1) * r] = B[group * size : (group + 1) * size]
    return own.flatten(0, 1), apart
