"""Layers as matrices: the matrices times the columns that they meet are what the layer answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn
from torch.func import functional_call

from compressor.calibration import layer_views
from compressor.calibration.layer_views import layer_view, output_rows, unfolded_inputs, unfolded_parts
from compressor.sharing.curvature import LayerView
from compressor.sharing.sites import Site, find_tensors

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear with positions": (nn.Linear(5, 3), (2, 7, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 9)),
    "conv1d same": (nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 2, 9)),
    "conv1d reflect": (nn.Conv1d(2, 3, 4, padding=3, padding_mode="reflect"), (2, 2, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "conv2d pointwise": (nn.Conv2d(3, 4, 1, stride=2), (2, 3, 6, 5)),
    "conv2d oblong": (nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 1), (1, 2)), (2, 3, 7, 8)),
    "conv2d groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 5)),
    "conv2d same": (nn.Conv2d(4, 2, (2, 4), padding="same", dilation=2, groups=2), (2, 4, 9, 8)),
    "conv2d valid": (nn.Conv2d(4, 2, 3, padding="valid"), (2, 4, 5, 5)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2), (2, 4, 5, 6)),
    "conv2d replicate": (nn.Conv2d(1, 2, 3, stride=2, padding=1, padding_mode="replicate"), (2, 1, 5, 6)),
    "timm same": (Conv2dSame(4, 6, 3, stride=2, groups=2), (2, 4, 7, 8)),
    "conv3d": (nn.Conv3d(4, 2, (3, 2, 1), stride=(1, 2, 1), padding=(1, 1, 0), groups=2), (2, 4, 3, 4, 2)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(3, 2, (3, 2), stride=(3, 1), output_padding=(2, 0)), (2, 3, 4, 3)),
    "transposed2d groups": (nn.ConvTranspose2d(6, 9, 3, 2, 1, 1, groups=3, dilation=2), (2, 6, 3, 4)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (2, 2, 2, 3, 2)),
}


def only_site(layer: nn.Module) -> Site:
    return next(site for site in find_tensors(layer) if site.name == "weight")


def view_of(layer: nn.Module) -> LayerView:
    view = layer_view(only_site(layer))
    assert view is not None
    return view


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_times_columns_are_what_the_layer_answers_without_bias(name: str) -> None:
    layer, shape = LAYERS[name]
    site, view = only_site(layer), view_of(layer)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        columns = unfolded_inputs(layer, inputs, view)
        answers = (view.matrices(site.tensor) @ columns.transpose(1, 2)).flatten(0, 1)  # groups are consecutive rows
        expected = functional_call(layer, {"bias": torch.zeros_like(layer.get_parameter("bias"))}, (inputs,))
    assert columns.dtype == torch.float32
    rows = expected.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    torch.testing.assert_close(answers, rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(output_rows(expected, layer), rows)


@pytest.mark.parametrize("name", LAYERS)
def test_tensor_undoes_matrices(name: str) -> None:
    layer, _ = LAYERS[name]
    weight = torch.arange(only_site(layer).tensor.numel()).view(only_site(layer).tensor.shape)
    view = view_of(layer)
    matrices = view.matrices(weight)
    assert torch.equal(view.tensor(matrices), weight)
    assert view.tensor(matrices.contiguous()).shape == weight.shape
    groups = getattr(layer, "groups", 1)
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    assert matrices.shape == (groups, outputs // groups, weight.numel() // outputs)


def test_columns_are_ordered_by_channel_then_position() -> None:
    layer = nn.Conv1d(2, 1, 2, bias=False)
    view = view_of(layer)
    inputs = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    assert unfolded_inputs(layer, inputs, view).tolist() == [[[1.0, 2.0, 10.0, 20.0], [2.0, 3.0, 20.0, 30.0]]]
    assert view.matrices(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist() == [[[1.0, 2.0, 3.0, 4.0]]]


def test_inputs_of_half_precision_are_met_in_float32() -> None:
    for layer, shape in (LAYERS["conv2d"], LAYERS["conv2d circular"], LAYERS["transposed1d"]):
        view = view_of(layer)
        inputs = torch.randn(shape)
        expected = unfolded_inputs(layer, inputs.bfloat16().float(), view)
        assert torch.equal(unfolded_inputs(layer.bfloat16(), inputs.bfloat16(), view), expected)
        layer.float()


def test_columns_have_no_gradient_and_hooks_of_the_layer_are_not_called() -> None:
    for layer, shape in LAYERS.values():
        view = view_of(layer)
        calls: list[None] = []
        handles = [layer.register_forward_hook(lambda *_, calls=calls: calls.append(None))]
        handles.append(layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None)))
        assert not unfolded_inputs(layer, torch.randn(shape, requires_grad=True), view).requires_grad
        for handle in handles:
            handle.remove()
        assert calls == []


class Doubled(nn.Linear):
    """Computes with another weight than the one it holds."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, 2 * self.weight)


@pytest.mark.parametrize(
    "layer",
    [ScaledStdConv2d(2, 3, 3), Doubled(2, 3), nn.Embedding(3, 2), nn.Bilinear(2, 2, 3), nn.LayerNorm(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_modules_have_no_view(layer: nn.Module) -> None:
    assert layer_view(only_site(layer)) is None


def test_tensors_other_than_weights_have_no_view() -> None:
    attention = nn.MultiheadAttention(4, 2)
    views = {site.name: layer_view(site) for site in find_tensors(attention)}
    assert views["in_proj_weight"] is None
    assert {site.name: layer_view(site) for site in find_tensors(nn.Linear(2, 3))}["bias"] is None


def test_a_weight_of_several_layers_has_a_view_where_they_are_alike() -> None:
    both = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    both[1].weight = both[0].weight
    site = find_tensors(both)[0]
    assert len(site.owners) == 2
    view = layer_view(site)
    assert view is not None
    assert view.shape == (2, 2)
    tied = nn.ModuleList([nn.Embedding(3, 2), nn.Linear(2, 3)])
    tied[1].weight = tied[0].weight
    assert layer_view(find_tensors(tied)[0]) is None


def test_layers_that_pair_a_weight_with_other_groups_have_no_view() -> None:
    both = nn.ModuleList([nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(2, 4, 3)])
    both[1].weight = both[0].weight
    assert layer_view(find_tensors(both)[0]) is None


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_columns_that_matter_are_met(name: str) -> None:
    layer, shape = LAYERS[name]
    site, whole = only_site(layer), view_of(layer)
    live = torch.arange(0, whole.columns, 2)
    view, inputs = replace(whole, live=live), torch.randn(shape)
    weight = site.tensor.detach()
    assert view.columns == len(live)
    assert torch.equal(view.matrices(weight), whole.matrices(weight)[..., live])
    assert torch.equal(unfolded_inputs(layer, inputs, view), unfolded_inputs(layer, inputs, whole)[..., live])
    expected = whole.matrices(weight).clone()
    expected[..., 1::2] = 0
    assert torch.equal(whole.matrices(view.tensor(view.matrices(weight))), expected)


def test_parts_are_the_inputs_of_a_few_images_each(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = LAYERS["conv2d groups"]
    view = view_of(layer)
    inputs = torch.randn(7, 4, 5, 5)
    whole = unfolded_inputs(layer, inputs, view)
    monkeypatch.setattr(layer_views, "CHUNK", 3 * 4 * 9 * 25)
    parts = list(unfolded_parts(layer, inputs, view))
    assert [part.shape[1] for part in parts] == [75, 75, 25]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    monkeypatch.setattr(layer_views, "CHUNK", 1)
    assert [part.shape[1] for part in unfolded_parts(layer, inputs, view)] == [25] * 7
