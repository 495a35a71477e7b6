"""Arguments of timm that a file may hold: all that are JSON and cannot reach a file, the network or code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
from torch import nn

from compressor.formats import loader
from compressor.formats.errors import MissingError
from compressor.formats.loader import build_model, refused_args
from compressor.formats.model_args import fault_of_args


@pytest.mark.parametrize(
    ("name", "args", "attribute", "expected"),
    [
        ("test_resnet", {"act_layer": "silu"}, lambda m: type(m.conv1[2]), nn.SiLU),
        ("test_resnet", {"output_stride": 8}, lambda m: m.layer4[0].conv2.dilation, (4, 4)),
        ("test_resnet", {"drop_rate": 0.25}, lambda m: m.drop_rate, 0.25),
        ("test_resnet", {"layers": [2, 1, 1, 1]}, lambda m: len(m.layer1), 2),
        ("test_resnet", {"img_size": None}, lambda m: m.num_classes, 1000),
        ("test_vit", {"embed_dim": 32, "num_heads": 2, "depth": 3}, lambda m: (m.embed_dim, len(m.blocks)), (32, 3)),
        ("test_vit", {"img_size": [96, 64], "patch_size": 8}, lambda m: m.patch_embed.grid_size, (12, 8)),
        ("test_vit", {"norm_layer": "rmsnorm"}, lambda m: type(m.norm).__name__, "RmsNorm"),
        ("test_vit", {"global_pool": ""}, lambda m: m.global_pool, ""),
        ("test_vit", {"qk_norm": True, "init_values": 1e-5}, lambda m: m.blocks[0].ls1.gamma.shape, (64,)),
    ],
)
def test_arguments_are_passed_on(name: str, args: dict[str, Any], attribute: Any, expected: Any) -> None:
    assert attribute(build_model(name, args)) == expected


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"act_layer": nn.SiLU}, "act_layer = <class .* not allowed, expected JSON: .* such as act_layer='silu'"),
        ({"norm_layer": "/etc/passwd"}, "norm_layer = '/etc/passwd' is not allowed, expected a word"),
        ({"norm_layer": "http://x"}, "expected a word"),
        ({"a" * 65: 1}, "expected a name"),
        ({"x\x1b": 1}, r"^x\\x1b = 1 is not allowed: expected a name"),
        ({"drop_rate": float("nan")}, "expected a finite number"),
        ({"drop_rate": 1e300}, "expected a finite number of at most 1e"),
        ({"window_size": 65_537}, "at most 65,536"),
        ({"block_args": [[[[[1]]]]]}, "at most 256 values, in at most 4 levels"),
        ({"widths": [1] * 257}, "at most 256 values"),
        ({"widths": [1, "a b"]}, "expected a word"),
        ({"extra": {"path": "a/b"}}, "expected a word"),
        ({"extra": {"a/b": 1}}, "expected a word"),
        ({"num_classes": [10]}, "expected a whole number from 0 to 1,000,000"),
        ({"img_size": (1, 2, 3)}, "expected 1 to 2 whole numbers"),
        ({"depths": [2, True]}, "depths"),
    ],
)
def test_refused_arguments(args: dict[str, Any], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(fault_of_args(args))


def test_allowed_values() -> None:
    assert fault_of_args({"a": None, "b": [1, -2.5, "x-y_z", {"k": (True, None)}], "num_classes": 0}) == ""


FACTORIES: list[Callable[..., Any]] = [timm.create_model, timm.models.build_model_with_cfg]


def test_nothing_of_the_factories_is_allowed() -> None:
    """A later timm may have more of them: they are read off its signatures, except those of ``kwargs.pop``."""
    names = {name for function in FACTORIES for name in inspect.signature(function).parameters} - {"kwargs"}
    assert {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg_overlay", "pretrained_filter_fn"} <= names
    for name in names | {"pruned", "features_only", "out_indices", "feature_cls", "device", "dtype"}:
        assert "not allowed" in refused_args({name: True}), name


def test_no_argument_reaches_a_file_or_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []
    listening = True

    def listen(event: str, args: tuple[Any, ...]) -> None:
        outside = event == "open" and "marker" in str(args[0])
        if listening and (outside or event in ("socket.connect", "socket.getaddrinfo", "urllib.Request")):
            reached.append(f"{event} {args}")

    sys.addaudithook(listen)
    names = {name for function in FACTORIES for name in inspect.signature(function).parameters}
    for model in ("test_resnet", "test_vit"):
        names |= inspect.signature(type(build_model(model, {})).__init__).parameters.keys()
        for name in sorted(names):
            for value in ("marker", {"url": "marker", "file": "marker"}, ["marker"]):
                try:
                    build_model(model, {name: value})
                except MissingError:
                    continue
    listening = False
    assert reached == []


def test_a_model_of_too_many_modules_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_MAX_MODULES", 30)
    with pytest.raises(MissingError, match=r"cannot build 'test_resnet' .*ValueError: more than 30 modules"):
        build_model("test_resnet", {})
    monkeypatch.undo()
    build_model("test_resnet", {})
