"""Packed files as tensors and timm models."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from compressor.formats.content import Content, RawTensor, SharedTensor, Table, decode
from compressor.formats.errors import FileError, FormatError, MissingError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.source import FileSource
from compressor.formats.file.writer import pack, write
from compressor.formats.loader import build_model, check_fits, load, load_state_dict, updated_cfg
from tests.helpers.forging import as_version_1, forged

DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_raw(tensor: torch.Tensor) -> RawTensor:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return RawTensor(DTYPES[tensor.dtype], tuple(tensor.shape), data)


def to_content(model: nn.Module, name: str | None = None, **more: Any) -> Content:
    """Share eight quantiles in every matrix; leave the rest untouched."""
    sites: dict[str, SharedTensor] = {}
    books: list[Table] = []
    untouched: dict[str, RawTensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            weights = tensor.float().numpy().reshape(-1)
            book = Table.of(np.quantile(weights, np.linspace(0.05, 0.95, 8)))
            indices = np.searchsorted(book.values[0, 1:, 0], weights, "right").astype(np.uint8)
            sites[key] = SharedTensor(tuple(tensor.shape), len(books), indices, DTYPES[tensor.dtype])
            books.append(book)
        else:
            untouched[key] = to_raw(tensor)
    named = {"name": name, "args": more.pop("args", {})} if name else None
    return Content(sites, tuple(books), untouched, model=named, **more)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    path = tmp_path_factory.mktemp("loader") / "test_resnet.safetensors"
    preprocessing = {
        "input_size": [1, 32, 32],
        "mean": [0.25],
        "std": [0.5],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    args = {"num_classes": 10, "in_chans": 1}
    write(path, to_content(model, "test_resnet", args=args, preprocessing=preprocessing))
    return path


def test_model_is_built_and_filled(resnet: Path) -> None:
    model = load(resnet)
    assert type(model).__name__ == "ResNet"
    assert not model.training
    with PackedFile.open(resnet) as file:
        for name, tensor in model.state_dict().items():
            if name in file.sites:
                assert torch.equal(tensor, torch.from_numpy(file.tensor(name)))
            else:
                assert to_raw(tensor).data == file.raw(name).data
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_preprocessing_is_timms(resnet: Path) -> None:
    config = timm.data.resolve_model_data_config(load(resnet))  # type: ignore[no-untyped-call]
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == (0.25,)
    assert config["crop_pct"] == 1.0


def test_own_module_is_filled_in_place(resnet: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    parameter = next(model.parameters())
    assert load(resnet, model=model) is model
    assert next(model.parameters()) is parameter
    built = load(resnet)
    assert all(
        torch.equal(one, two) for one, two in zip(model.state_dict().values(), built.state_dict().values(), strict=True)
    )


def test_other_head_names_the_keys(resnet: Path) -> None:
    with pytest.raises(MissingError, match=r"fc\.weight \(10, 96\) vs \(7, 96\).*num_classes"):
        load(resnet, model=timm.create_model("test_resnet", num_classes=7, in_chans=1))


def test_other_model_names_the_keys(resnet: Path) -> None:
    with pytest.raises(MissingError, match=r"is missing.* more; check num_classes") as caught:
        load(resnet, model=timm.create_model("test_vit", num_classes=10))
    assert caught.value.exit_code == 4


def test_check_fits_takes_content_too() -> None:
    model = build_model("test_vit", {})
    assert all(tensor.is_meta for tensor in model.parameters())
    check_fits(to_content(timm.create_model("test_vit")), model)
    with pytest.raises(MissingError):
        check_fits(Content({}, ()), model)


def test_file_without_a_model(tmp_path: Path) -> None:
    write(tmp_path / "a", to_content(nn.Linear(3, 2)))
    with pytest.raises(MissingError, match=r"names no timm model: .*load\(path, model=...\)"):
        load(tmp_path / "a")
    assert torch.equal(
        load(tmp_path / "a", nn.Linear(3, 2)).state_dict()["bias"], load_state_dict(tmp_path / "a")["bias"]
    )


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("resnet34x", {}, "Did you mean 'resnet34'"),
        ("hf-hub:timm/resnet18", {}, "has no model"),
        ("local-dir:/tmp", {}, "has no model"),
        ("test_resnet", {"checkpoint_path": "/tmp/x"}, "checkpoint_path .*not allowed"),
        ("test_resnet", {"pretrained": True}, "not allowed"),
        ("test_resnet", {"num_classes": 10**9}, "not allowed"),
        ("test_resnet", {"num_classes": True}, "not allowed"),
        ("test_resnet", {"in_chans": 0}, "not allowed"),
        ("test_vit", {"img_size": [224, "x"]}, "not allowed"),
        ("test_vit", {"img_size": 10**9}, "not allowed"),
        ("test_vit", {"img_size": []}, "img_size = .* is not allowed, expected 1 to 2 whole numbers from 1 to 8,192"),
        ("test_vit", {"img_size": 1}, "file and VisionTransformer differ"),
        ("test_vit", {"num_heads": 0}, "cannot build 'test_vit' with {'num_heads': 0}: ZeroDivisionError"),
        ("maxvit_tiny_tf_224", {"img_size": 1}, "cannot build 'maxvit_tiny_tf_224' with {'img_size': 1}"),
        ("test_vit", {"patch_size": 0}, "patch_size = 0 is not allowed"),
        ("test_vit", {"depth": 100_000}, "depth = 100000 is not allowed, expected .* from 0 to 1,024"),
        ("test_vit", {"embed_dim": 10**9}, "embed_dim = .* is not allowed, expected .* at most 65,536"),
        ("test_resnet", {"global_pool": ["avg"]}, "cannot build"),
        ("test_resnet", {"act_layer": "os.system"}, "act_layer = 'os.system' is not allowed, expected a word"),
        ("test_resnet", {"act_layer": "nosuch"}, "cannot build 'test_resnet' .*KeyError: 'nosuch'"),
        ("test_resnet", {"features_only": True}, "features_only = True is not allowed"),
        ("test_resnet", {"pretrained_cfg": {"url": "x"}}, "pretrained_cfg = .*not allowed"),
        ("test_resnet", {"img_size": 64}, "cannot build"),
    ],
)
def test_models_that_a_file_may_not_name(tmp_path: Path, name: str, args: dict[str, Any], text: str) -> None:
    data = pack(Content({}, (), {"a": RawTensor("F32", (), bytes(4))}, model={"name": name, "args": args}))
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(MissingError, match=text):
        load(tmp_path / "a")


def test_model_entry_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(forged(lambda fields: fields["model"].update(name=["resnet18"])))
    with pytest.raises(FormatError, match=r"metadata: model: name is \['resnet18'\], expected 1 to 128 characters"):
        load(tmp_path / "a")


@pytest.mark.parametrize("size", [[], 1, [1], [7, 7, 7]])
@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "mixer_s32_224", "coat_tiny"])
def test_sizes_that_constructors_fail_on(name: str, size: Any) -> None:
    """IndexError, ZeroDivisionError and whatever else comes out of them; most of these do build with 1."""
    with contextlib.suppress(MissingError):
        build_model(name, {"img_size": size})


def test_reason_that_cannot_be_built_is_printable() -> None:
    with pytest.raises(MissingError, match="global_pool = ") as caught:
        build_model("test_resnet", {"global_pool": "\x1b[2J"})
    assert str(caught.value).isprintable()


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    content = to_content(Tied())
    sites = {"embed.weight": content.sites["embed.weight"]}
    write(tmp_path / "a", Content(sites, content.books[:1], aliases={"head.weight": "embed.weight"}))
    state = load_state_dict(tmp_path / "a")
    assert state["head.weight"] is state["embed.weight"]
    with torch.device("meta"):
        model = Tied()
    load(tmp_path / "a", model)
    assert model.head.weight is model.embed.weight
    assert not model.head.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    content = to_content(nn.Linear(40, 30).to(dtype))
    write(tmp_path / "a", content)
    state = load_state_dict(tmp_path / "a")
    assert state["weight"].dtype == state["bias"].dtype == dtype
    expected = decode(content.sites["weight"], content.books[0])
    assert state["weight"].view(torch.uint8).numpy().tobytes() == expected.tobytes()
    assert to_raw(state["bias"]).data == content.untouched["bias"].data


@pytest.mark.parametrize(
    "dtype", ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "U16", "I16", "U32", "I32", "U64", "I64", "F64"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 2)])
def test_untouched_dtypes(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    from compressor.formats.dtypes import ITEM_SIZES

    data = bytes([1, 0, 0, 0, 0, 0, 0, 0] * 4)[: int(np.prod(shape)) * ITEM_SIZES[dtype]]
    write(tmp_path / "a", Content({}, (), {"a": RawTensor(dtype, shape, data)}))
    tensor = load_state_dict(tmp_path / "a")["a"]
    assert tensor.shape == shape
    assert tensor.element_size() == ITEM_SIZES[dtype]
    assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data


def sizes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that is going to have the bytes of each reading of a file."""
    read: list[int] = []
    plain = FileSource.read

    def counted(self: FileSource, start: int, size: int) -> memoryview:
        read.append(size)
        return plain(self, start, size)

    monkeypatch.setattr(FileSource, "read", counted)
    return read


def test_a_small_part_is_read_without_the_large_one_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raws = {f"{size}.{number}": RawTensor("U8", (size,), bytes([1, 2]) * (size // 2)) for number in range(3)
            for size in (1_000, 200_000)}  # fmt: skip
    write(tmp_path / "a", Content({}, (), raws))
    read = sizes_read(monkeypatch)
    with PackedFile.open(tmp_path / "a") as file:
        for name in reversed(raws):  # as where tensors are read by several threads
            read.clear()
            file.raw(name)
            assert sum(read) <= raws[name].shape[0] + 2_000


@pytest.mark.parametrize("version", [1, 2])
def test_only_what_is_asked_is_read(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """In version 2 also the parts of at most 64 KiB before and after that have a checksum with what is asked for."""
    path = tmp_path / "a"
    path.write_bytes(resnet.read_bytes() if version == 2 else as_version_1(resnet.read_bytes()))
    read = sizes_read(monkeypatch)
    with PackedFile.open(path) as file:
        opening = sum(read)
        sizes = file.sizes()
        assert opening <= sizes.header + sizes.checksums + 100
        wanted = file.sites["fc.weight"].size + 8 * 4
    read.clear()
    state = load_state_dict(path, names=["fc.weight"])
    assert list(state) == ["fc.weight"]
    besides = sum(read) - opening - wanted
    assert besides == 0 if version == 1 else 0 < besides <= 2 << 16 < sizes.file - wanted


def test_unknown_name_of_a_tensor(resnet: Path) -> None:
    with pytest.raises(MissingError, match=r"no tensor 'fc\.weigth'.*Did you mean 'fc\.weight'"):
        load_state_dict(resnet, names=["fc.weigth"])


def test_damaged_file_does_not_load(resnet: Path, tmp_path: Path) -> None:
    data = bytearray(resnet.read_bytes())
    data[-5000] ^= 4
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FileError, match="checksum"):
        load(tmp_path / "a")


def test_loading_never_initialises_and_leaves_the_random_state(resnet: Path) -> None:
    state = torch.get_rng_state()
    load(resnet)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_said_of_timms_weights_is_not_said_of_others() -> None:
    model: Any = timm.create_model("test_resnet", num_classes=2)
    own = {"test_input_size": (3, 288, 288), "test_crop_pct": 1.0, "label_offset": 1, "first_conv": "conv1.0"}
    model.pretrained_cfg = {**own, "label_names": ["a"] * 1000, "num_classes": 1000, "crop_pct": 0.5}
    cfg = updated_cfg(model, {"input_size": [3, 32, 32], "label_names": ["ant", "bee"]})
    assert cfg == {
        "first_conv": "conv1.0", "num_classes": 2, "crop_pct": 0.5, "input_size": (3, 32, 32),
        "label_names": ("ant", "bee"),
    }  # fmt: skip
    assert "label_names" not in updated_cfg(model, {"label_names": ["ant", "bee", "cow"]})
    assert updated_cfg(nn.Linear(1, 1), {"crop_pct": 1.0}) == {"crop_pct": 1.0}
