"""Rules, policies and recipes: what matches, what wins, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from compressor.formats.errors import PolicyError
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=10, in_chans=1)


def plans(policy: Policy, model: nn.Module) -> dict[str, str]:
    return {plan.site.name: str(plan.scheme or plan.reason) for plan in policy.plan(model)}


def test_default_sites_are_weights_of_linear_and_conv(model: nn.Module) -> None:
    shared = plans(Policy([Rule("*", scheme="learnt", bits=2)]), model)
    expected = [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert list(shared) == expected


def test_first_match_wins_and_schemes_are_inherited(model: nn.Module) -> None:
    policy = Policy([Rule("fc", bits=8), Rule.ignore("conv1"), Rule("*", scheme="kmeans", bits=4)])
    found = plans(policy, model)
    assert found["fc.weight"] == "kmeans codewords=256"
    assert found["conv1.0.weight" if "conv1.0.weight" in found else "conv1.weight"] == "ignored by rule 2 (conv1)"
    assert found["layer1.0.conv1.weight"] == "kmeans codewords=16"


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        ("layer1", "layer1.0.conv1.weight"),
        ("layer1.*.conv1", "layer1.0.conv1.weight"),
        ("re:layer[12].0.conv1", "layer2.0.conv1.weight"),
        ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("*.conv1.weight", "layer3.0.conv1.weight"),
    ],
)
def test_patterns_match_tensors_and_modules_above(model: nn.Module, match: str, hit: str) -> None:
    found = plans(Policy([Rule(match, scheme="kmeans", bits=3), Rule("*", scheme="learnt", bits=4)]), model)
    assert found[hit] == "kmeans codewords=8"
    assert found["layer4.0.conv2.weight"] == "learnt codewords=16"


def test_types_narrow_a_rule(model: nn.Module) -> None:
    found = plans(Policy([Rule("*", "kmeans", types=["Linear"], bits=8), Rule("*", scheme="learnt", bits=4)]), model)
    assert [name for name, plan in found.items() if plan.startswith("kmeans ")] == ["fc.weight"]


def test_other_tensors_are_shared_only_when_spelt_out() -> None:
    vit = timm.create_model("test_vit", num_classes=10)
    everything = Policy([Rule("*", scheme="learnt", bits=4)])
    assert {name: plan for name, plan in plans(everything, vit).items() if "pos_embed" in name or "norm" in name} == {
        "pos_embed": "a position or token, by its name; shared only by a rule that names it"
    }
    named = Policy([Rule("pos_embed", scheme="learnt", bits=4), Rule("*.norm1.weight", bits=2), Rule("*", "learnt")])
    assert {"pos_embed", "blocks.0.norm1.weight"} <= set(plans(named, vit))


def test_a_tensor_no_larger_than_its_codebook_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(32, 32))
    found = plans(Policy([Rule("*", scheme="learnt", bits=4)]), model)
    assert found["0.weight"] == "12 weights are no more than the 16 values they would share"


def test_double_precision_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16).double(), nn.Linear(32, 32))
    assert "torch.float64" in plans(Policy([Rule("*", scheme="learnt", bits=2)]), model)["0.weight"]


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("lernt", {"bits": 4}, "no scheme 'lernt'. Did you mean 'learnt'?"),
        ("learnt", {"bitz": 4}, "no setting 'bitz'. Did you mean 'bits'?"),
        ("learnt", {"bits": 99}, "takes 1 to 16 bits, got 99"),
        ("learnt", {"bits": "four"}, "bits must be a whole number, got 'four'"),
        ("learnt", {"bits": True}, "bits must be a whole number, got True"),
        ("learnt", {"codewords": 0}, "setting 'codewords'"),
        ("learnt", {"codewords": "16"}, "setting 'codewords'"),
        ("learnt", {"sparsity": 2}, "rule 'fc', sparsity"),
    ],
)
def test_what_a_rule_refuses_at_once(scheme: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message.replace("?", r"\?")):
        Rule("fc", scheme=scheme, **settings)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("fc", bitz=4), Rule("*", scheme="learnt")], "'learnt' has no setting 'bitz'. Did you mean 'bits'?"),
        ([Rule("*", bits=4)], "names no scheme"),
        ([], "at least one rule"),
        ("x", "a policy is a list of rules, .*: got 'x'"),
    ],
)
def test_what_a_policy_refuses(rules: list[Rule], message: str) -> None:
    with pytest.raises(PolicyError, match=message.replace("?", r"\?")):
        Policy(rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("layr1", bits=2), Rule("*", scheme="learnt", bits=4)], r"rule 1 \('layr1'\).*Did you mean 'layer1'"),
        ([Rule("bn1", bits=2), Rule("*", scheme="learnt", bits=4)], r"rule 1 \('bn1'\) matches no tensor"),
        ([Rule.ignore("*"), Rule("fc", scheme="learnt", bits=4)], "nothing to share: all"),
    ],
)
def test_rules_that_do_not_fit_the_model(model: nn.Module, rules: list[Rule], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy(rules).plan(model)


def test_nothing_to_share() -> None:
    with pytest.raises(PolicyError, match="nothing to share: no weights of two or more"):
        Policy([Rule("*", scheme="learnt", bits=4)]).plan(nn.BatchNorm2d(4))


def test_a_rule_without_a_pattern_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"begins with a pattern of names, such as '\*': got 3"):
        Rule(3)  # type: ignore[arg-type]


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"re:\(.*not a regular expression"):
        Rule("re:(")


def test_tied_tensors_are_one_site_under_all_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    policy = Policy([Rule("head", scheme="kmeans", bits=2)])
    assert list(plans(policy, model)) == ["embed.weight"]


RECIPE = """
[[stage]]
epochs = 3
lr = 0.01

[[stage.rule]]
match = "fc"
bits = 8

[[stage.rule]]
match = "conv1"
ignore = true

[[stage.rule]]
match = "*"
types = ["Conv2d"]
scheme = "learnt"
bits = 4
"""


def test_recipes_say_everything_and_come_back_equal() -> None:
    recipe = Recipe.from_toml(RECIPE)
    said = recipe.to_dict()["stage"][0]
    whole = {"group": "site", "group_size": 0, "channel_scale": False, "vector": 1}
    learnt = {"codewords": 256, **whole, "rate": 0.0, "soft": 0.0, "init": "optimal"}
    assert said["rule"][0] == {"match": "fc", "scheme": "learnt", **learnt}
    assert said["rule"][1] == {"match": "conv1", "ignore": True}
    assert said["epochs"] == 3
    assert said["opt"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 3", "epoch = 3", "my.toml, stage 1: unknown key 'epoch'. Did you mean 'epochs'"),
        ("epochs = 3", 'epochs = "three"', "my.toml, stage 1, epochs: .*three"),
        ("epochs = 3", "epochs = -1", "my.toml, stage 1, epochs"),
        ("bits = 8", "bitz = 8", "my.toml, stage 1: .*no setting 'bitz'. Did you mean 'bits'"),
        ('match = "fc"', "match = 3", "my.toml, stage 1, rule 1, match: expected str, got 3"),
        ("ignore = true", 'ignore = "yes"', "rule 2, ignore: expected bool"),
        ("ignore = true", "ignore = true\nbits = 3", "rule 2: ignore = true leaves no room for bits"),
        ('scheme = "learnt"', 'scheme = "lernt"', "Did you mean 'learnt'"),
        ("[[stage]]", "[[stag]]", "unknown key 'stag'"),
        ("lr = 0.01", "lr = ", "my.toml is not TOML"),
        ("lr = 0.01", "lr = 0.01\nlr = 0.02", "my.toml is not TOML"),
    ],
)
def test_recipes_refuse_what_they_do_not_know(old: str, new: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Recipe.from_toml(RECIPE.replace(old, new, 1).replace("[[stag.rule]]", "[[stage.rule]]"), "my.toml")


def test_an_empty_recipe_is_refused() -> None:
    with pytest.raises(PolicyError, match="at least one"):
        Recipe.from_toml("")


def test_rules_show_themselves() -> None:
    assert repr(Rule("fc", bits=8)) == "Rule('fc', bits=8)"
    assert torch.nn.Linear.__name__ in repr(Rule("*", types=["Linear"]))


def test_a_regular_expression_matches_whole_names() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("conv1", "conv10", "my_conv1")})
    policy = Policy([Rule(r"re:conv1", scheme="kmeans", bits=2), Rule.ignore("*")])
    assert [plan.site.name for plan in policy.plan(model) if plan.scheme] == ["conv1.weight"]


def test_settings_that_a_rule_does_not_name_are_those_of_the_last_rule() -> None:
    last = Rule("*", scheme="learnt", bits=4, init="linear", group="channel", sparsity=0.25)
    eight, named, other = Policy(
        [Rule("a", bits=8), Rule("b", init="density"), Rule("c", scheme="kmeans"), last]
    ).rules[:3]
    assert (eight.scheme, eight.settings["codewords"], eight.settings["init"]) == ("learnt", 256, "linear")
    assert (eight.settings["group"], eight.settings["sparsity"]) == ("channel", 0.25)
    assert (named.settings["codewords"], named.settings["init"]) == (16, "density")
    assert (other.settings["init"], "sparsity" in other.settings) == ("optimal", False)


def test_what_a_rule_names_wins_over_its_bits() -> None:
    (scheme,) = Policy([Rule("*", scheme="kmeans", bits=4, codewords=5)]).schemes
    assert scheme is not None
    assert scheme.stored_values(100) == 5
