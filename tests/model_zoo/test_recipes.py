"""The shipped recipes: each one reads, says what it is, and fits models of several families."""

from __future__ import annotations

import pytest

from compressor import Recipe
from compressor.formats.errors import MissingError
from compressor.formats.loader import build_model
from compressor.model_zoo import list_recipes, recipe_text


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_reads_and_says_what_it_is(name: str) -> None:
    text = recipe_text(name)
    assert text.startswith("# ")
    recipe = Recipe.from_toml(text, name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "model", ["resnet34", "test_vit", "test_efficientnet", "mobilenetv3_small_050", "convnext_atto"]
)
@pytest.mark.parametrize("name", list_recipes())
def test_recipe_fits(name: str, model: str) -> None:
    sketch = build_model(model, {})
    for stage in Recipe.from_toml(recipe_text(name), name).stages:
        assert any(plan.scheme for plan in stage.policy.plan(sketch))


def test_unknown_recipe() -> None:
    with pytest.raises(MissingError, match=r"no recipe 'kmean4'\. Did you mean 'kmeans4'\?"):
        recipe_text("kmean4")
