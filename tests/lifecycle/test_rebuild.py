"""A timm model is stored with the arguments that give it again, or as any module; never as another model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.trace import Trace

POLICY = Policy([Rule("*", scheme="uniform", bits=8)])


def create(name: str = "test_resnet", **args: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **args)


def saved(path: Path, model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """Packs a model, loads it by its name, and returns the model that was packed and the one that was loaded."""
    job = Compressor(model, POLICY, teacher=None, **options).prepare()
    job.finish().save(path)
    return job.model, compressor.load(path)


def stored_args(path: Path) -> Any:
    with PackedFile.open(path) as file:
        return None if file.model is None else file.model["args"]


def answer(model: nn.Module, *shape: int) -> Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, Any]]] = {
    "plain": (lambda: create(), (3, 160, 160), {}),
    "activation": (
        lambda: create(num_classes=10, act_layer="silu"), (3, 160, 160), {"num_classes": 10, "act_layer": "silu"},
    ),
    "stride": (
        lambda: create(num_classes=10, output_stride=8), (3, 64, 64), {"num_classes": 10, "output_stride": 8},
    ),
    "vit": (
        lambda: create("test_vit", img_size=96, patch_size=8, embed_dim=32, depth=3, num_heads=2, norm_layer="rmsnorm"),
        (3, 96, 96),
        {"img_size": 96, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "norm_layer": "rmsnorm"},
    ),
    "channels": (lambda: create(in_chans=1, drop_rate=0.5), (1, 64, 64), {"in_chans": 1, "drop_rate": 0.5}),
    "head": (lambda: with_head(create(), nn.Linear(96, 7)), (3, 64, 64), {"num_classes": 7}),
    "reset": (lambda: reset(create(num_classes=9)), (3, 64, 64), {"num_classes": 5, "global_pool": "max"}),
    "resized": (lambda: resized(create("test_vit")), (3, 96, 128), {"img_size": [96, 128]}),
    "no classes": (lambda: create(num_classes=0), (3, 64, 64), {"num_classes": 0}),
}  # fmt: skip


def with_head(model: Any, head: nn.Module) -> Any:
    model.fc = head
    return model


def reset(model: Any) -> Any:
    model.reset_classifier(5, "max")
    return model


def resized(model: Any) -> Any:
    model.set_input_size(img_size=(96, 128))
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_arguments_are_found_and_stored(tmp_path: Path, kind: str) -> None:
    build, shape, args = MODELS[kind]
    packed, loaded = saved(tmp_path / "a", build())
    assert stored_args(tmp_path / "a") == args
    assert torch.equal(answer(packed, *shape), answer(loaded, *shape))


@pytest.mark.parametrize("kind", ["channels", "head", "resized", "plain"])
def test_arguments_are_found_where_timm_records_none(tmp_path: Path, kind: str) -> None:
    """Before 1.0.27 timm kept no arguments: what shows is read off the model."""
    build, shape, args = MODELS[kind]
    model = build()
    del model._model_args
    packed, loaded = saved(tmp_path / "a", model)
    assert stored_args(tmp_path / "a") == {key: value for key, value in args.items() if key != "drop_rate"}
    assert torch.equal(answer(packed, *shape), answer(loaded, *shape))


def test_a_swapped_pooling_is_found(tmp_path: Path) -> None:
    model = create(num_classes=10)
    model.global_pool = timm.layers.SelectAdaptivePool2d(pool_type="max", flatten=True)
    packed, loaded = saved(tmp_path / "a", model)
    assert stored_args(tmp_path / "a") == {"num_classes": 10, "global_pool": "max"}
    assert torch.equal(answer(packed, 3, 64, 64), answer(loaded, 3, 64, 64))


ANY_MODULE: dict[str, Callable[[], Any]] = {
    "head": lambda: with_head(create(), nn.Sequential(nn.Dropout(0.2), nn.Linear(96, 10))),
    "features": lambda: create(features_only=True),
    "class": lambda: create(act_layer=nn.SiLU),
    "swapped": lambda: without_relu(create()),
    "fused": lambda: reparameterize_model(create("mobileone_s0", num_classes=10)),
}


def without_relu(model: Any) -> Any:
    model.layer1[0].act1 = nn.Tanh()
    return model


@pytest.mark.parametrize("kind", ANY_MODULE)
def test_what_timm_cannot_build_is_any_module(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Compressor(ANY_MODULE[kind](), POLICY, teacher=None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "it is stored as any module, to be loaded with load(path, model=...)" in caplog.text
    job.prepare().finish().save(tmp_path / "a")
    assert len(caplog.records) == 1
    with pytest.raises(MissingError, match=r"names no timm model: give the module to fill, load\(path, model=...\)"):
        compressor.load(tmp_path / "a")
    loaded = compressor.load(tmp_path / "a", model=ANY_MODULE[kind]())
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(loaded(x), job.model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "given", "text"),
    [
        (
            lambda: create(num_classes=10, act_layer="silu"),
            {"num_classes": 10},
            r"conv1.2 is SiLU\(.*\) here and ReLU\(.*\) in the rebuilt model: "
            r"pass model_args=dict\(num_classes=10, act_layer='silu'\)",
        ),
        (
            lambda: create(output_stride=8),
            {},
            r"stride=\(1, 1\).* here and .*stride=\(2, 2\).*; left out, dict\(output_stride=8\) is found",
        ),
        (
            lambda: create(global_pool="max"),
            {},
            r"AdaptiveMaxPool2d.*pass model_args=dict\(global_pool='max'\)",
        ),
        (lambda: create("test_vit", norm_layer="rmsnorm"), {}, r"norm1\.bias \(64,\) is missing"),
        (lambda: create(num_classes=10), {"num_classes": 11}, r"fc.weight \(10, 96\) vs \(11, 96\)"),
        (lambda: create(num_classes=10), {"nosuch": 1}, "cannot build 'test_resnet'"),
        (
            lambda: with_head(create(), nn.Identity()),
            {},
            "; left out, the model is stored as any module$",
        ),
    ],
)
def test_other_arguments_are_refused_before_the_training(build: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(MissingError, match=text):
        Compressor(build(), POLICY, model_args=given, teacher=None)


@pytest.mark.parametrize("given", [{"act_layer": nn.SiLU}, {"pretrained": True}, {"checkpoint_path": "x"}])
def test_arguments_that_no_file_may_hold_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"model_args: {next(iter(given))} = .* is not allowed"):
        Compressor(create(), POLICY, model_args=given)


def test_a_model_that_changes_later_is_not_saved_until_its_arguments_are_right(tmp_path: Path) -> None:
    job = Compressor(create(num_classes=10, act_layer="silu"), POLICY, teacher=None).prepare()
    job.model_args = {"num_classes": 10}
    packed = job.finish()
    for _ in range(2):
        with pytest.raises(MissingError, match=r"act_layer='silu'\); set packed.model_args and save again$"):
            packed.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    packed.model_args = {"num_classes": 10, "act_layer": "silu"}
    packed.save(tmp_path / "a")
    assert torch.equal(answer(compressor.load(tmp_path / "a"), 3, 64, 64), answer(job.model, 3, 64, 64))
    packed.model_args = None
    packed.save(tmp_path / "b")
    assert stored_args(tmp_path / "b") is None
    with pytest.raises(UsageError, match="names no timm model"):
        packed.model_args = {}


def test_training_mode_and_random_state_are_left(tmp_path: Path) -> None:
    model = create().train()
    model.bn = model.layer1[0].bn1.eval()
    before = torch.get_rng_state()
    Trace.of(model, [(1, 3, 64, 64)])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.layer1[0].bn1.training


def test_a_model_of_other_inputs_is_told_apart_by_its_layers() -> None:
    one, two = Trace.of(nn.Bilinear(3, 3, 2), [(1, 3)]), Trace.of(nn.Bilinear(3, 3, 1), [(1, 3)])
    assert one.shape == ()
    assert one.first_difference(one) is None
    assert one.first_difference(two) is not None


def test_layers_of_other_settings_that_compute_the_same_are_equal() -> None:
    """Dropout does nothing in eval mode; an epsilon does, however little."""
    drop = [Trace.of(nn.Sequential(nn.Dropout(p)), [(2, 8)]) for p in (0.1, 0.5)]
    assert drop[0].first_difference(drop[1]) is None
    norm = [Trace.of(nn.Sequential(nn.LayerNorm(8, eps=eps)), [(2, 8)]) for eps in (1e-6, 1e-5)]
    difference = norm[0].first_difference(norm[1])
    assert difference is not None
    assert difference[0] == "0"
