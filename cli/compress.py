"""``compress MODEL``: its options. Names and meaning as in timm's scripts where timm has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.gates import in_bytes
from compressor.cli.options import Options

__all__ = ["compress"]

path = click.Path(path_type=Path)
OPTIONS = (
    click.Option(["--scheme"], help="How weights share values: see 'compress schemes'. [default: learnt, 4 bits]"),
    click.Option(["--bits"], type=int, help="Bits of an index: 2^BITS shared values for most schemes."),
    click.Option(["--codewords"], type=click.IntRange(1), help="Number of shared values, instead of --bits."),
    click.Option(["--delta"], type=float, help="Largest relative distance of a weight to its value, for wfn."),
    click.Option(["--sparsity"], type=float, help="Share of weights that are pruned to zero, under any scheme."),
    click.Option(["--set", "settings"], metavar="KEY=VALUE", multiple=True, help="A setting of the scheme."),
    click.Option(["--recipe"], metavar="NAME|FILE", help="Shipped recipe, TOML file, or that of a packed file."),
    click.Option(["--dataset"], help="digits, fashion-mnist, or a timm name: torch/cifar10, hfds/..., wds/..."),
    click.Option(["--data-dir"], type=path, help="Folder of the data; alone: pictures in train/CLASS and val/CLASS."),
    click.Option(["--dataset-download"], is_flag=True, help="Let torchvision fetch torch/... into --data-dir."),
    click.Option(["--max-bad-images"], metavar="N", type=click.IntRange(0), default=0, show_default=True,
                 help="Pictures that may be unreadable; all are listed in bad_images.txt beside the output."),
    click.Option(["-j", "--workers"], type=click.IntRange(0),
                 help="Processes that open pictures; 0: this one alone. [default: as many as processors, up to 4]"),
    click.Option(["--aa"], metavar="POLICY", help="timm's augmentation of pictures, such as rand-m9-mstd0.5."),
    click.Option(["--reprob"], type=click.FloatRange(0, 1), help="Share of pictures a part of which is erased."),
    click.Option(["--pretrained"], is_flag=True, help="Start from timm's weights; without data no training follows."),
    click.Option(["--checkpoint-path"], type=path, help="Start from these weights; without data no training follows."),
    click.Option(["--from-scratch"], is_flag=True, help="Train weights and shared values together from random ones."),
    click.Option(["--num-classes"], type=click.IntRange(1), help="Classes of the head. [default: the data's]"),
    click.Option(["--in-chans"], type=click.IntRange(1), help="Channels of the images. [default: the data's]"),
    click.Option(["--img-size"], type=click.IntRange(1), help="Height and width of the images. [default: the data's]"),
    click.Option(["--batch-size"], type=click.IntRange(2), help="Images per fine-tuning step. [default: 64]"),
    click.Option(["--grad-accum", "--grad-accum-steps", "grad_accum"], type=click.IntRange(1),
                 help="Batches of a step, whose gradients are added up. [default: 1]"),
    click.Option(["--epochs"], type=click.IntRange(0), help="Epochs of fine-tuning. [default: 4; from scratch 12]"),
    click.Option(["--baseline-epochs"], type=click.IntRange(0), help="Of dense models. [default: 12, or 40]"),
    click.Option(["--opt"], help="timm's optimiser for fine-tuning. [default: adamw]"),
    click.Option(["--lr"], type=float, help="Learning rate of fine-tuning. [default: 0.0003; from scratch 0.003]"),
    click.Option(["--sched"], help="timm's schedule for fine-tuning. [default: cosine]"),
    click.Option(["--weight-decay"], type=float, help="Of weights that are not shared. [default: 0]"),
    click.Option(["--mixup"], metavar="ALPHA", type=float, help="Mix pairs of images, as timm does. [default: 0]"),
    click.Option(["--cutmix"], metavar="ALPHA", type=float, help="Put a part of one image into another. [default: 0]"),
    click.Option(["--smoothing"], type=float, help="Label smoothing. [default: 0]"),
    click.Option(["--layer-decay"], type=float, help="Learning rate of a layer to that of the next. [default: 1]"),
    click.Option(["--model-ema-decay"], type=float, help="Average the weights over the steps, and pack the average."),
    click.Option(["--distill"], type=float, help="Weight of distillation from the dense model, 0 to 1. [default: 0.5]"),
    click.Option(["--teacher"], metavar="MODEL", help="Distil from this bigger timm model instead."),
    click.Option(["--teacher-checkpoint"], type=path, help="Its weights, packed or not. [default: trained and kept]"),
    click.Option(["--device"], help="cpu, cuda, cuda:1, mps, ... [default: the fastest there is]"),
    click.Option(["--amp"], is_flag=True, help="Mixed precision: bfloat16, or float16 where a GPU lacks it."),
    click.Option(["--channels-last"], is_flag=True, help="Images with their channels together in memory."),
    click.Option(["--torchcompile"], metavar="BACKEND", is_flag=False, flag_value="inductor",
                 help="Compile fine-tuning, as torch.compile does. [default backend: inductor]"),
    click.Option(["--calibration-images"], type=click.IntRange(0), default=1024, show_default=True,
                 help="Training images that BatchNorm is re-estimated on at the end."),
    click.Option(["--seed"], type=click.IntRange(0), default=0, show_default=True, help="Of everything random."),
    click.Option(["--codec"], default="auto", show_default=True, help="How indices become bytes."),
    click.Option(["--untouched"], type=click.Choice(["f32", "f16"]), default="f32", show_default=True,
                 help="Store what is not shared, such as norms and biases, rounded to float16."),
    click.Option(["-o", "--output"], type=path, help="File to write. [default: MODEL-DATA-SCHEME.safetensors]"),
    click.Option(["--force"], is_flag=True, help="Replace the file if it exists."),
    click.Option(["--resume"], is_flag=True, help="Go on where the same command was stopped or killed."),
    click.Option(["--checkpoint-minutes"], type=click.FloatRange(0), default=10.0, show_default=True,
                 help="Between checkpoints in the middle of an epoch; 0: only at its end."),
    click.Option(["--checkpoint-steps"], type=click.IntRange(0), default=0, help="Steps between checkpoints, also."),
    click.Option(["--summary"], metavar="FILE", type=path,
                 help="A row of figures per epoch, as timm's. [default: OUTPUT.summary.csv]"),
    click.Option(["--log"], type=click.Choice(["tensorboard"]), help="Note them in OUTPUT.tensorboard, too."),
    click.Option(["--require-top1"], metavar="PERCENT", type=click.FloatRange(0, 100),
                 help="Exit 5 below; the file is kept as OUTPUT.rejected."),
    click.Option(["--require-drop"], metavar="POINTS", type=float, help="Likewise where top-1 falls by more."),
    click.Option(["--require-size"], metavar="BYTES", callback=in_bytes, help="Likewise for a larger file, as 1.5MB."),
    click.Option(["--dry-run"], is_flag=True, help="Show the fate of every tensor and the size; write nothing."),
    click.Option(["--all", "everything"], is_flag=True, help="Show every tensor in the table."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document on stdout instead of the table."),
)  # fmt: skip


def _run(**options: Any) -> None:
    from compressor.cli.run import run

    run(Options(**options))


compress = click.Command("run", params=[click.Argument(["model"]), *OPTIONS], callback=_run, help="Compress a MODEL.")
