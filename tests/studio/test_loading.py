"""Weights that are converted as they are read: the file's pages go, and nothing else does."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from studio import models
from studio.loading import lets_go_of_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")


def resident_bytes_of(file) -> int:
    found = re.search(rf"{re.escape(str(file))}\n(?:\w.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(4_000_000, dtype=torch.float32), "v": torch.ones(3)}, path)
    return path


def test_pages_of_a_file_leave_memory_once_they_are_converted_and_can_be_read_again(file):
    with safe_open(file, framework="pt") as weights:
        w = weights.get_tensor("w")
        plain = w.to(torch.bfloat16)
        assert resident_bytes_of(file) > 15e6
        with lets_go_of_files():
            converted = w.to(torch.bfloat16)
            assert resident_bytes_of(file) < 1e6
        assert torch.equal(converted, plain)
        assert torch.equal(w, torch.arange(4_000_000, dtype=torch.float32))


def test_what_lies_in_no_file_keeps_its_values_and_the_environment_is_as_it_was():
    before = dict(os.environ)
    w = torch.arange(4_000_000, dtype=torch.float32)
    with lets_go_of_files():
        w.to(torch.bfloat16)
    assert torch.equal(w, torch.arange(4_000_000, dtype=torch.float32)) and dict(os.environ) == before


def test_a_model_is_loaded_in_another_type_with_the_values_it_has_in_its_own(tiny_folder, workspace):
    own, other = (models.load_model(str(tiny_folder), workspace, dtype=d) for d in (torch.float32, torch.bfloat16))
    for (name, p), q in zip(own.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name
