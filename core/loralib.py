"""Files of loralib, the authors' own library: tensors without settings, and the forms that only it has."""

import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.errors import AdapterFileError, quoted
from core.files import Contents, config_for
from core.fused import FUSED_NAMES
from core.matrices import Factors, Layout
from core.pairs import NO_PAIRS, not_lora, read_tensors, sort_tensors

QKV = ("q", "k", "v")


def read_loralib(path: Path, scaling: float | None, parts: Sequence[str] | None) -> Contents:
    """Reads one file of microsoft/LoRA's: `….lora_A` (r, in), `….lora_B` (out, r), and parameters trained in full.

    Its `MergedLinear` has `….lora_A` (g · r, in) and `….lora_B` (g · out, r) for the g adapted of the slices of a fused
    projection, that lie in it one after the other: they become slices of their own, named by `parts`.

    Raises:
        AdapterFileError: The file is damaged, holds code or no LoRA factors, or `scaling` or `parts` is missing.
    """
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
    else:
        _check_size(path)
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch's on how the file was pickled
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle sets off in its reader
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise AdapterFileError(
                f"{path} cannot be read as tensors alone: it is damaged, or holds more than data and is not opened "
                f"({first}). Ask its maker for safetensors."
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{path} must hold a table of tensors, as loralib saves one; it holds something else.")
    layouts: dict[str, Layout] = {}
    problems: list[str] = []
    for fused, num_parts in _merged(tensors, parts).items():
        if parts is None or len(parts) != num_parts:
            problems.append(
                f"{fused} has {num_parts} slices of a fused projection that the file does not name; `parts` "
                f"(={quoted(parts)}) must, in their order: loralib's GPT-2 has ('q', 'v')"
            )
            tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{fused}.lora_")}
        else:
            layouts |= _take_apart(tensors, fused, parts)
    found = sort_tensors(tensors)
    pairs, wrong = found.pairs, found.problems
    if problems and not pairs:
        wrong = [problem for problem in wrong if problem != NO_PAIRS]
    if problems or wrong:
        raise AdapterFileError(not_lora(path, problems + wrong))
    if scaling is None:
        raise AdapterFileError(
            f"`scaling` (=None) must be given for {path.name}: loralib's files do not say alpha. It is alpha / r; "
            f"r is {next(iter(pairs.values())).A.shape[0]} here, and loralib's own examples take alpha = 2r, so 2."
        )
    if not 0 < scaling < math.inf:
        raise AdapterFileError(f"`scaling` (={scaling}) must be above 0.")
    factors = {name: Factors(p.A, p.B, scaling, layouts.get(name, p.layout)) for name, p in pairs.items()}
    return Contents(config_for(factors, found.extras), factors, None, {}, found.extras)


def as_convolution(f: Factors, weight_shape: Sequence[int]) -> Factors | None:
    """Returns the update that loralib's factors of a convolution make, as one of the matrix (out, in · k · k).

    loralib takes A (r · k, in · k) and B (out · k, r · k), and lays B·A out anew as (out, in, k, k): the k rows of B·A
    that are one output channel's stand in a row. So A stands k times on the diagonal, and B's k rows side by side,
    for an r of r · k². With groups the k rows become k / groups.

    Args:
        f: What a file has of it.
        weight_shape: The convolution's, (out, in / groups, k, k).

    Returns:
        The factors; None where they are not loralib's form of such a convolution, or groups divide its rows.
    """
    out, *kernel = weight_shape
    num_rows, odd = divmod(f.B.shape[0], out)
    if f.layout.form != "linear" or odd or num_rows < 2 or num_rows * f.A.shape[1] != math.prod(kernel):
        return None
    A = torch.block_diag(*[f.A] * num_rows)
    return Factors(A, f.B.reshape(out, num_rows * f.r), f.scaling, Layout("convolution", kernel=tuple(kernel)))


def _merged(tensors: Mapping[str, Tensor], parts: Sequence[str] | None) -> dict[str, int]:
    """Returns path → number of slices of each pair that is a `MergedLinear`'s; of one slice, going by its name."""
    found = {}
    for key, A in tensors.items():
        path, _, half = key.rpartition(".")
        B = tensors.get(f"{path}.lora_B")
        if half != "lora_A" or B is None or A.dim() != 2 or B.dim() != 2 or not B.numel():
            continue
        num_parts, odd = divmod(A.shape[0], B.shape[1])
        one = num_parts == 1 and parts is not None and len(parts) == 1 and path.rpartition(".")[2] in FUSED_NAMES
        if not odd and not B.shape[0] % max(1, num_parts) and (num_parts > 1 or one):
            found[path] = num_parts
    return found


def _take_apart(tensors: dict[str, Tensor], fused: str, parts: Sequence[str]) -> dict[str, Layout]:
    """Puts the slices of `fused` in its place among the tensors; returns path → layout of each.

    Query, key and value lie in this order, whichever of them are adapted; other parts are all that there are.
    """
    A, B = tensors.pop(f"{fused}.lora_A"), tensors.pop(f"{fused}.lora_B")
    order = QKV if set(parts) <= set(QKV) else tuple(parts)
    size = B.shape[0] // len(parts)
    layouts = {}
    for name, own_A, own_B in zip(parts, A.chunk(len(parts)), B.chunk(len(parts)), strict=True):
        path, first = f"{fused}.{name}", order.index(name) * size
        tensors |= {f"{path}.lora_A": own_A, f"{path}.lora_B": own_B}
        layouts[path] = Layout("slice", rows=torch.arange(first, first + size), num_rows=size * len(order))
    return layouts


def _check_size(path: Path) -> None:
    """Refuses a zip file that holds more than its size, which torch would unpack to any size."""
    try:
        with zipfile.ZipFile(path) as packed:
            num_bytes = sum(part.file_size for part in packed.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # torch says better what it is
    if num_bytes > path.stat().st_size:
        raise AdapterFileError(
            f"{path} must hold its tensors as torch.save writes them; here they are packed and would take "
            f"{num_bytes:,} bytes. Load and save the file where it was made."
        )
