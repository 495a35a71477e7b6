"""Packs timm architectures of many families without training, loads them again and compares bit for bit.

    python benchmarks/architectures.py [--minutes 10] [--model NAME]

Each model is built with random weights (seed 0) and shares 16 values per tensor (k-means); the file is saved and
loaded again. "bit-equal" means that every tensor of the state dict, every buffer that is computed rather than saved,
and the logits of one random image equal those of the model before saving, bit for bit. Each row is appended to
``results/architectures.jsonl`` as soon as it is measured. A later call measures only missing and failed rows, so the
run can be cut into slices. The table between the markers of ``README.md`` is rewritten from all rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import timm
import torch
from page import put
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.file.reader import PackedFile
from compressor.report.report import dense_size

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.jsonl"
POLICY = Policy([Rule("*", scheme="kmeans", bits=4)])
EQUAL = "bit-equal"
SMALL = 128  # height and width of the image where the model accepts any size

FAMILIES = {
    "ResNet": "resnet10t resnet18 resnet26d resnext26ts seresnext26ts resnet34 ecaresnet26t resnetblur18",
    "ResNet, attention in it": "botnet26t_256 halonet26t lambda_resnet26t bat_resnext26ts gcresnext26ts skresnet18",
    "weight-standardised, free of norms": "nf_regnet_b0 nf_resnet26 eca_nfnet_l0 resnetv2_50x1_bit regnetz_b16_evos",
    "other ConvNets": "vgg11_bn densenet121 dpn68 inception_v3 xception41p dla46_c darknet17 cspnext_tiny vovnet39a "
    "hrnet_w18_small selecsls42 res2net50_14w_8s resnest14d regnetx_002 regnety_002 gernet_s hgnetv2_b0 rdnet_tiny",
    "depthwise": "mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_035 efficientnet_lite0 mixnet_s "
    "lcnet_050 fbnetc_100 mnasnet_small ghostnet_050 ghostnetv3_050 tinynet_e rexnet_100 starnet_s050 "
    "inception_next_atto",
    "conditional convolutions": "efficientnet_cc_b0_4e",
    "re-parametrised": "repvgg_a0 mobileone_s0 repghostnet_050 repvit_m0_9 fastvit_t8",
    "ConvNeXt": "convnext_atto convnextv2_atto convnext_zepto_rms edgenext_xx_small mambaout_femto fasternet_t0",
    "ViT": "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_relpos_small_patch16_224 eva02_tiny_patch14_224 "
    "cait_xxs24_224 xcit_nano_12_p16_224 convit_tiny pit_ti_224 tnt_s_patch16_224 crossvit_tiny_240 volo_d1_224",
    "ViT, hierarchical": "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 davit_tiny "
    "focalnet_tiny_srf nest_tiny mvitv2_tiny pvt_v2_b0 twins_svt_small gcvit_xxtiny hiera_tiny_224 tiny_vit_5m_224",
    "ConvNet and attention": "mobilevit_xxs mobilevitv2_050 efficientvit_b0 efficientvit_m0 efficientformerv2_s0 "
    "levit_128s levit_conv_128s coatnet_nano_rw_224 maxvit_pico_rw_256 poolformer_s12 visformer_tiny shvit_s1",
    "tied tensors": "coat_lite_tiny coat_tiny",
    "MLP": "mixer_s32_224 gmlp_ti16_224 resmlp_12_224 gmixer_12_224 convmixer_768_32 sequencer2d_s",
}


def measure(family: str, name: str, folder: Path) -> dict[str, Any]:
    """Packs, saves, loads and compares one model, and returns its row; an exception becomes the outcome."""
    row: dict[str, Any] = {"model": name, "family": family}
    path = folder / "model.safetensors"
    start = time.process_time()
    try:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        job = Compressor(model, POLICY, copy=False, teacher=None).prepare()
        job.finish().save(path, force=True)
        saved = time.process_time()
        loaded = compressor.load(path)
        row |= {"pack_seconds": round(saved - start, 2), "load_seconds": round(time.process_time() - saved, 2)}
        row |= figures(path)
        row["outcome"] = compare(job.model, loaded)
    except Exception as error:  # a benchmark reports every failure as a row
        row["outcome"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def figures(path: Path) -> dict[str, Any]:
    """Returns the counts and sizes of a packed file."""
    with PackedFile.open(path) as file:
        dense = dense_size(file)
        return {
            "sites": len(file.sites),
            "weights": sum(site.weights for site in file.sites.values()),
            "tied": len(file.aliases),
            "file": file.source.size,
            "dense": dense,
            "ratio": round(dense / file.source.size, 2),
        }


def compare(model: nn.Module, loaded: nn.Module) -> str:
    """Returns a description of the first difference (names, a tensor, a tie, the logits), or ``EQUAL``."""
    before, after = (dict(net.state_dict(keep_vars=True)) | dict(net.named_buffers()) for net in (model, loaded))
    if list(before) != list(after):
        return "names or their order differ"
    for name, tensor in before.items():
        if not same(tensor, after[name]):
            return f"{name} differs"
    if ties(before) != ties(after):
        return "tied tensors are no longer tied"
    with torch.no_grad():
        image = torch.randn(1, *input_size(model))
        old, new = model.eval()(image), loaded(image)
    if not torch.isfinite(old).all():
        return "logits are not finite, before and after" if same(old, new) else "logits are not finite"
    return EQUAL if same(old, new) else f"logits differ by up to {float((old - new).abs().max()):g}"


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Returns the channels, height and width of an image for the model, a small one where its size is not fixed."""
    config: Any = model.pretrained_cfg
    channels, height, width = config["input_size"]
    if config.get("fixed_input_size"):
        return channels, height, width
    smallest = max(config.get("min_input_size") or (SMALL,))
    return channels, min(height, max(SMALL, smallest)), min(width, max(SMALL, smallest))


def same(one: Tensor, two: Tensor) -> bool:
    """Returns whether two tensors have the same bits: -0.0 differs from 0.0, and a NaN equals itself."""
    alike = one.shape == two.shape and one.dtype == two.dtype
    bits = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two))
    return alike and torch.equal(*bits)


def ties(states: dict[str, Tensor]) -> list[int]:
    """Returns, for each name, the position of the first name of the same tensor."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), position) for position, tensor in enumerate(states.values())]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, in the order given; failures show their reason."""
    equal = sum(row["outcome"] == EQUAL for row in rows)
    lines = [
        f"{equal} of {len(rows)} architectures come back bit-equal.",
        "",
        "| family | model | tensors shared | weights shared | dense bytes | file bytes | ratio | pack CPU s "
        "| load CPU s | outcome |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [f"{row[key]:,}" if key in row else "" for key in ("sites", "weights", "dense", "file")]
        cells += [f"{row['ratio']:.2f}x" if "ratio" in row else ""]
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("pack_seconds", "load_seconds")]
        tied = f", {row['tied']} names tied" if row.get("tied") else ""
        lines.append(f"| {' | '.join([row['family'], row['model'], *cells, row['outcome'] + tied])} |")
    return "\n".join(lines)


def read_rows() -> dict[str, dict[str, Any]]:
    """Returns the newest row of each model measured so far, by model name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


@click.command()
@click.option("--minutes", default=float("inf"), help="Start no further model after this many minutes.")
@click.option("--model", "only", help="Only this model.")
def main(minutes: float, only: str | None) -> None:
    """Measures the models that are missing or failed, and rewrites the table."""
    start = time.perf_counter()
    models = {name: family for family, names in FAMILIES.items() for name in names.split()}
    rows = read_rows()
    wanted = [name for name in models if rows.get(name, {}).get("outcome") != EQUAL and only in (None, name)]
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            if time.perf_counter() - start > 60 * minutes:
                print("time is up: call again for the rest")
                break
            rows[name] = measure(models[name], name, Path(folder))
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(rows[name], flush=True)
    put("architectures", table([rows[name] for name in models if name in rows]))


if __name__ == "__main__":
    main()
