import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Literal

import pytest

from core import Config, LoRAConfig, LoRAError, TrainConfig, setting, settings


@dataclass(frozen=True)
class Everything(Config):
    """One field of each kind that `setting` can declare."""

    count: int = setting(2, "Count", "A whole number.", minimum=1, maximum=9)
    ratio: float = setting(0.5, "Ratio", "A share.", above=0, below=1)
    free: float = setting(0.0, "Free", "Any finite number.")
    name: str | None = setting(None, "Name", "Text, or nothing.")
    flag: bool = setting(False, "Flag", "Yes or no.")
    kind: Literal["x", "y"] = setting("x", "Kind", "One of two.", choices=("x", "y"))
    names: tuple[str, ...] = setting((), "Names", "Many.")
    table: dict[str, int] = setting({}, "Table", "Name to number.")


@pytest.mark.parametrize("config", [LoRAConfig, TrainConfig, Everything])
def test_defaults_are_valid_and_every_setting_explains_itself(config):
    config()
    for s in settings(config):
        assert s.problem(s.default) is None
        assert s.label and s.help.endswith(".")
        assert getattr(config(), s.name) == s.default


def test_the_docstring_says_where_each_setting_comes_from():
    sources = dict(re.findall(r"(?m)^ {8}([a-z_A-Z, ]+): (.+)$", LoRAConfig.__doc__ or ""))
    told = [name for names in sources for name in names.split(", ")]
    assert sorted(told) == sorted(s.name for s in settings(LoRAConfig))
    assert "lora_plus_ratio: LoRA+, Hayou et al. 2024, arXiv:2402.12354" in (TrainConfig.__doc__ or "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"`r` \(=0\) must be at least 1"),
        ({"r": -4}, r"`r` \(=-4\) must be at least 1"),
        ({"r": 2.5}, r"`r` \(=2.5\) must be a whole number"),
        ({"r": True}, r"`r` \(=True\) must be a whole number"),
        ({"r": None}, r"`r` \(=None\) must be a whole number"),
        ({"r": "8"}, r"`r` \(='8'\) must be a whole number"),
        ({"alpha": 0}, r"`alpha` \(=0.0\) must be above 0"),
        ({"alpha": math.nan}, r"`alpha` \(=nan\) must be above 0"),
        ({"alpha": math.inf}, r"`alpha` \(=inf\) must be above 0"),
        ({"alpha": True}, r"`alpha` \(=True\) must be a number"),
        ({"dropout": 1.0}, r"`dropout` \(=1.0\) must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"`dropout` \(=-0.1\) must be at least 0 and below 1"),
        ({"target_modules": ()}, r"`target_modules` \(=\(\)\) must name at least one matrix; for example q_proj"),
        ({"target_modules": ""}, r"`target_modules` \(=''\) must name at least one matrix"),
        ({"target_modules": ("q", "")}, r"`target_modules` .* must name at least one matrix"),
        ({"target_modules": ("q", 3)}, r"`target_modules` .* must be text or a list of names"),
        ({"target_modules": None}, r"`target_modules` \(=None\) must be text or a list of names"),
        ({"scaling": "loud"}, r"`scaling` \(='loud'\) must be one of standard, rslora"),
        ({"scaling": ["standard"]}, r"`scaling` .* must be one of standard, rslora"),
        ({"init": 3}, r"`init` \(=3\) must be one of kaiming, gaussian"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` \(=0\) must be at least 1"),
        ({"rank_pattern": {"q": 1.5}}, r"`rank_pattern` .* must be a table of name to number"),
        ({"rank_pattern": [1]}, r"`rank_pattern` .* must be a table of name to number"),
        ({"alpha_pattern": {"q": 0}}, r"`alpha_pattern\['q'\]` \(=0\) must be above 0"),
        ({"alpha_pattern": {"q": math.nan}}, r"`alpha_pattern\['q'\]` \(=nan\) must be above 0"),
        ({"alpha_pattern": {3: 1.0}}, r"`alpha_pattern` .* must be a table of name to number"),
    ],
)
def test_wrong_lora_settings_are_refused_by_name_and_value(values, message):
    with pytest.raises(LoRAError, match=message):
        LoRAConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"`steps` \(=0\) must be at least 1"),
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be at least 1"),
        ({"accumulation": 0}, r"`accumulation` \(=0\) must be at least 1"),
        ({"learning_rate": 0}, r"`learning_rate` \(=0.0\) must be above 0 and at most 10"),
        ({"learning_rate": 11}, r"`learning_rate` \(=11.0\) must be above 0 and at most 10"),
        ({"learning_rate": math.nan}, r"`learning_rate` \(=nan\) must be above 0"),
        ({"schedule": "step"}, r"`schedule` \(='step'\) must be one of linear, cosine, constant"),
        ({"warmup_steps": -1}, r"`warmup_steps` \(=-1\) must be at least 0"),
        ({"warmup_steps": 61}, r"`warmup_steps` \(=61\) must be at most `steps` \(=60\)"),
        ({"clip_norm": -1.0}, r"`clip_norm` \(=-1.0\) must be at least 0"),
        ({"max_length": 7}, r"`max_length` \(=7\) must be at least 8"),
        ({"seed": 2**31}, r"`seed` \(=2147483648\) must be at least 0 and at most 2147483647"),
        ({"device": 3}, r"`device` \(=3\) must be text"),
        ({"precision": "fp8"}, r"`precision` \(='fp8'\) must be one of auto, fp32, bf16"),
    ],
)
def test_wrong_training_settings_are_refused_by_name_and_value(values, message):
    with pytest.raises(LoRAError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 10}, r"`count` \(=10\) must be at least 1 and at most 9"),
        ({"ratio": 1}, r"`ratio` \(=1.0\) must be above 0 and below 1"),
        ({"free": -math.inf}, r"`free` \(=-inf\) must be a finite number"),
        ({"free": math.nan}, r"`free` \(=nan\) must be a finite number"),
        ({"name": 3}, r"`name` \(=3\) must be text or nothing"),
        ({"flag": 1}, r"`flag` \(=1\) must be true or false"),
        ({"names": "ab"}, r"`names` \(='ab'\) must be a list of names"),
        ({"table": {"a": "b"}}, r"`table` .* must be a table of name to number"),
    ],
)
def test_every_kind_of_bound_and_type_is_checked(values, message):
    with pytest.raises(LoRAError, match=message):
        Everything(**values)


@pytest.mark.parametrize("values", [{"count": 1}, {"count": 9}, {"ratio": 1e-9}, {"name": None}, {"names": []}])
def test_inclusive_bounds_and_empty_values_are_allowed(values):
    Everything(**values)


def test_all_problems_come_in_one_message():
    with pytest.raises(LoRAError, match=r"`r` \(=0\).*; `alpha` \(=-1.0\).*; `dropout` \(=2.0\).*\.$"):
        LoRAConfig(r=0, alpha=-1, dropout=2)


def test_json_numbers_and_lists_are_taken_as_what_they_mean():
    config = LoRAConfig(r=4.0, alpha=8, target_modules=["q_proj"])
    assert (config.r, config.alpha, config.target_modules) == (4, 8.0, ("q_proj",))
    assert (type(config.r), type(config.alpha)) == (int, float)


def test_a_config_goes_through_json_and_comes_back_equal():
    config = LoRAConfig(r=3, target_modules=("q_proj", "v_proj"), rank_pattern={"q_proj": 2}, alpha_pattern={"v": 0.5})
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    train = TrainConfig(steps=7, learning_rate=2e-4, schedule="cosine")
    assert TrainConfig.from_dict(json.loads(json.dumps(train.to_dict()))) == train


def test_from_dict_fills_defaults_and_names_unknown_settings():
    assert LoRAConfig.from_dict({"r": 2}) == LoRAConfig(r=2)
    with pytest.raises(LoRAError, match=r"LoRAConfig has no setting 'rank', 'lora_alpha'; it has r, alpha, dropout"):
        LoRAConfig.from_dict({"rank": 2, "lora_alpha": 3})


@pytest.mark.parametrize("values", [None, [1], "r=8", 3])
def test_from_dict_refuses_what_is_no_table(values):
    with pytest.raises(LoRAError, match="LoRAConfig must be given as a table of settings"):
        LoRAConfig.from_dict(values)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().r = 4


def test_defaults_are_not_shared_between_configs():
    LoRAConfig().rank_pattern["q_proj"] = 2
    assert LoRAConfig().rank_pattern == {}


def test_a_table_that_the_caller_changes_later_does_not_change_the_config():
    ranks = {"q_proj": 2}
    config = LoRAConfig(rank_pattern=ranks)
    ranks["q_proj"] = 0
    config.to_dict()["rank_pattern"]["v_proj"] = -1
    assert config.rank_pattern == {"q_proj": 2}


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(LoRAError, match="`alpha`"):
        LoRAConfig(alpha=10**400)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_refused(field):
    with pytest.raises(LoRAError, match=field):
        LoRAConfig(**{field: {"q_proj(": 2}})


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoRAConfig(scaling="standard").scaling_for(16, 8.0) == 0.5
    assert LoRAConfig(scaling="rslora").scaling_for(16, 8.0) == 2.0
