"""A suggested recipe runs as it is, and treats first, last and depthwise layers apart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import nn

from compressor import Recipe
from compressor.formats.errors import PolicyError
from compressor.policy.suggestion import suggest_recipe

MODELS = [
    "test_resnet", "mobilenetv3_small_050", "test_vit", "convnext_atto", "deit_tiny_distilled_patch16_224",
    "mixer_s32_224",
]  # fmt: skip


def meta(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def plans(name: str, model: nn.Module, cfg: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe.from_toml(suggest_recipe(model, name, cfg), name)
    return {plan.site.name: plan.scheme for plan in recipe.stages[0].policy.plan(model)}


@pytest.mark.parametrize("name", MODELS)
def test_ends_and_depthwise_layers_are_finer_and_the_rest_is_not(name: str) -> None:
    model = meta(name)
    cfg = model.pretrained_cfg
    found = plans(name, model, cfg)
    heads = cfg["classifier"] if isinstance(cfg["classifier"], tuple | list) else [cfg["classifier"]]
    modules = dict(model.named_modules())
    seen = set()
    for tensor, scheme in found.items():
        module = modules[tensor.rpartition(".")[0]] if tensor.endswith(".weight") else None
        if tensor.removesuffix(".weight") in (cfg["first_conv"], *heads):
            kind, expected = "end", {None, 256}
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            kind, expected = "depthwise", {None, 64}  # None: too few weights to gain
        else:
            kind, expected = "rest", {None, 16}
        seen.add(kind)
        assert (None if scheme is None else scheme.codewords) in expected, tensor
    assert {"end", "rest"} <= seen
    assert ("depthwise" in seen) == (name in ("mobilenetv3_small_050", "convnext_atto"))


def test_one_pattern_covers_the_depthwise_layers_and_no_other() -> None:
    text = suggest_recipe(meta("mobilenetv3_small_050"), "mobilenetv3_small_050", {})
    assert r"match = 're:^blocks\.\d+\.\d+\.conv_dw\.weight$'" in text
    alike = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Linear(64, 8)
    )
    found = plans("alike", alike, {})
    assert found["1.weight"].codewords == 16  # named like a depthwise one
    assert found["2.weight"].codewords == 64


def test_a_model_without_names_of_its_ends_has_its_first_and_last_layer_apart() -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(100, 100))
    assert [scheme.codewords for scheme in plans("net", net, {}).values()] == [256, 16, 256]


def test_a_model_of_one_layer_has_one_rule() -> None:
    assert [scheme.codewords for scheme in plans("net", nn.Sequential(nn.Linear(100, 100)), {}).values()] == [16]


def test_a_model_that_has_nothing_to_share_is_refused() -> None:
    with pytest.raises(PolicyError, match="net: nothing to share"):
        suggest_recipe(nn.Sequential(nn.BatchNorm2d(3)), "net", {})


def test_the_settings_in_comments_are_the_defaults() -> None:
    text = suggest_recipe(meta("test_resnet"), "test_resnet", {})
    uncommented = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE).replace("sparsity = 0.8", "")
    assert uncommented.count(" = ") > text.count("\n# ") / 2
    assert Recipe.from_toml(uncommented).stages[0].training == Recipe.from_toml(text).stages[0].training
    assert max(map(len, text.splitlines())) <= 130
