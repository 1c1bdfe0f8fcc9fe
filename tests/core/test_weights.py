"""W's own spectrum, its noise edge, and its SVD on disk."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import LoRAError, top_svd, weight_spectrum, weight_svd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pure_noise_ends_at_the_edge_and_what_is_planted_stands_above_it():
    W = 0.3 * normal(300, 200)
    found = weight_spectrum(W)
    assert found.norm == pytest.approx(W.norm().item(), rel=1e-12)
    assert found.edge == pytest.approx(0.3 * (math.sqrt(300) + math.sqrt(200)), rel=0.01)
    assert found.sigma[0].item() == pytest.approx(found.edge, rel=0.03)
    assert found.num_above <= 2
    U, V = (torch.linalg.qr(normal(n, 4, seed=n))[0] for n in (300, 200))
    planted = weight_spectrum(W + 2 * found.edge * U @ V.T)
    assert planted.num_above == 4


@pytest.mark.parametrize("theta", [1.0, 2.5])
def test_an_update_hidden_in_noise_shows_where_theory_says(theta):
    """Benaych-Georges and Nadakuditi 2012, c = m/n = 0.5, noise of variance 1/n."""
    m, n, c = 400, 800, 0.5
    u, v = (torch.linalg.qr(normal(k, 1, seed=k))[0] for k in (m, n))
    svd = top_svd(normal(m, n) / math.sqrt(n) + theta * u @ v.T, 1)
    square = theta**2
    assert svd.sigma[0].item() == pytest.approx(math.sqrt((1 + square) * (c + square)) / theta, rel=0.02)
    assert (svd.U.T @ u).item() ** 2 == pytest.approx(1 - c * (1 + square) / (square * (square + c)), abs=0.06)
    assert (svd.V.T @ v).item() ** 2 == pytest.approx(1 - (c + square) / (square * (square + 1)), abs=0.06)


def test_a_weak_update_does_not_leave_the_noise():
    m, n = 400, 800
    u, v = (torch.linalg.qr(normal(k, 1, seed=k))[0] for k in (m, n))
    noise = normal(m, n) / math.sqrt(n)
    strongest = weight_spectrum(noise + 0.5 * u @ v.T).sigma[0].item()  # below 0.5^¼ = 0.841
    assert strongest == pytest.approx(1 + math.sqrt(0.5), rel=0.03)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 5), (7, 7)])
def test_the_svd_rebuilds_W_from_the_cache_bit_for_bit(tmp_path, shape):
    W = normal(*shape).bfloat16()
    cache = tmp_path / "svd"
    found = weight_svd(W, cache)
    assert found.is_whole and found.shape == shape
    torch.testing.assert_close(found.U * found.sigma @ found.V.T, W.double(), rtol=0, atol=1e-13)
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    again = weight_svd(W.clone(), cache)
    assert file.stat().st_mtime_ns == before
    for one, other in zip((found.U, found.sigma, found.V), (again.U, again.sigma, again.V), strict=True):
        assert torch.equal(one, other)


def test_each_weight_has_a_file_of_its_own(tmp_path):
    W = normal(6, 4)
    other = W.clone()
    other[5, 3] += 1e-12
    for one in (W, other, W.float(), W.reshape(4, 6), W.T):
        weight_svd(one, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def damage(file, how):
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "no file of tensors":
        file.write_bytes(b"nothing")
    elif how == "one bit":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        tensors = load_file(file)
        changed = {
            "no sigma": lambda: tensors.pop("sigma"),
            "a NaN": lambda: tensors["U"].__setitem__((2, 1), math.nan),
            "other shapes": lambda: tensors.update(V=tensors["V"][:-1].contiguous()),
            "float32": lambda: tensors.update(V=tensors["V"].float()),
            "another weight's": lambda: tensors.update(sigma=2 * tensors["sigma"]),
        }
        changed[how]()
        save_file(tensors, file)


@pytest.mark.parametrize(
    "how",
    ["cut short", "no file of tensors", "one bit", "no sigma", "a NaN", "other shapes", "float32", "another weight's"],
)
def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path, how):
    W = normal(12, 8)
    weight_svd(W, tmp_path)
    (file,) = tmp_path.iterdir()
    good = {k: t.clone() for k, t in load_file(file).items()}  # what is loaded is the file itself
    damage(file, how)
    found = weight_svd(W, tmp_path)
    torch.testing.assert_close(found.U * found.sigma @ found.V.T, W, rtol=0, atol=1e-13)
    assert {k: torch.equal(t, good[k]) for k, t in load_file(file).items()} == {"U": True, "sigma": True, "V": True}
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRAError, match=r"`cache` \(='.*file/inside'\) could not be written: .*Free some space"):
        weight_svd(normal(3, 4), tmp_path / "file" / "inside")


def test_the_top_is_the_head_of_the_whole():
    W = normal(30, 20)
    whole, top = weight_svd(W), top_svd(W, 5)
    assert not top.is_whole and top.shape == (30, 20)
    torch.testing.assert_close(top.sigma, whole.sigma[:5])
    torch.testing.assert_close((top.U.T @ whole.U[:, :5]).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    with pytest.raises(LoRAError, match=r"`q` \(=21\) must be from 1 to 20, the directions of W"):
        top_svd(W, 21)


@pytest.mark.parametrize("W", [torch.ones(3), torch.empty(0, 4), torch.full((2, 2), math.nan)])
def test_a_weight_is_a_finite_matrix(W):
    for function in (weight_spectrum, weight_svd, lambda W: top_svd(W, 1)):
        with pytest.raises(LoRAError, match=r"`W` \(=\(.*\)\) must be a matrix of finite numbers"):
            function(W)
