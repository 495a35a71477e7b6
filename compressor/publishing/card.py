"""The model card of a packed file: metadata for the hub's index, and a page for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import compressor
from compressor.comparison.tables import escaped, table_of_tensors, text_of
from compressor.formats.io.hub import PACKED, PREFIX
from compressor.report.interval import wilson_interval
from compressor.report.report import Report

__all__ = ["model_card"]

LIBRARY = "timm-compressor"
TASK = "image-classification"
TAGS = [TASK, "timm", "weight-sharing", "compression"]
OWN_IMAGES = "images of your own"
TOLD = "fetched", "accuracy"  # of what the file says, by the card itself
OF_THE_HUB = "hfds/"  # what timm puts before the name of a data set on the hub


def model_card(
    report: Report, repository: str, *, command: str, sha256: str, base_model: str | None, picture: str | None
) -> str:
    """Returns the README.md of a repository, whatever its packed file says in a form that no Markdown is made of.

    Args:
        report: of the packed file.
        repository: ``OWNER/NAME``.
        command: that runs the file's recipe again; "": it has none.
        sha256: of the packed file, in hexadecimal digits.
        base_model: the repository of the dense weights; None: it is not known.
        picture: the name of its picture in the repository; None: there is none.
    """
    name = repository.rpartition("/")[2]
    parts = [f"---\n{_metadata(report, name, base_model)}\n---", f"# {name}", _introduction(report, base_model)]
    parts += [_table(_figures(report))]
    parts += [f"![Bytes of the file by tensor and part]({picture})"] if picture else []
    parts += ["## Use it", _use(report, repository, sha256), "## How it was made", _made(report, command)]
    parts += [_tensors(report)] if report.rows else []
    return "\n\n".join(parts) + "\n"


def _metadata(report: Report, name: str, base_model: str | None) -> str:
    """Returns the YAML of the hub's index: library, task, data, base model and accuracy."""
    from huggingface_hub import EvalResult, ModelCardData

    made = report.provenance
    results: list[EvalResult] = []
    data = None if made.data is None else made.data.name.removeprefix(OF_THE_HUB)
    if made.data is not None and made.top1 is not None:
        low, high = (round(end, 4) for end in wilson_interval(made.top1.packed, made.data.n))
        results = [
            EvalResult(
                task_type=TASK, dataset_type=data or "imagefolder", dataset_name=data or OWN_IMAGES,
                dataset_split=made.data.split, metric_type="accuracy", metric_name="top-1",
                metric_value=made.top1.packed, metric_args={"n": made.data.n, "low": low, "high": high},
            )
        ]  # fmt: skip
    relation: dict[str, Any] = {} if base_model is None else {"base_model_relation": "quantized"}
    card = ModelCardData(
        library_name=LIBRARY, pipeline_tag=TASK, tags=TAGS, datasets=[data] if data else None, base_model=base_model,
        metrics=["accuracy"] if results else None, model_name=name, eval_results=results or None,
        **relation,
    )  # fmt: skip
    return card.to_yaml()


def _introduction(report: Report, base_model: str | None) -> str:
    model, totals = report.origin.model, report.totals
    what = "A network" if model is None else f"{_text(model['name'])} of timm"
    base = f" It was made from [{base_model}](https://huggingface.co/{base_model})." if base_model else ""
    return (
        f"{what} whose weights share a few values: {totals.dense:,} bytes of dense weights are {totals.file:,} bytes "
        f"here, {totals.ratio:.1f} times smaller.{base} The file is one of {LIBRARY} {compressor.__version__}, which "
        "loads it as an ordinary PyTorch model."
    )


def _figures(report: Report) -> Iterator[tuple[str, str]]:
    """Yields what the table of the card says."""
    totals, made = report.totals, report.provenance
    yield "dense weights, bytes", f"{totals.dense:,}"
    yield "this file, bytes", f"{totals.file:,}"
    yield "times smaller", f"{totals.ratio:.2f}"
    yield "parameters", f"{totals.parameters:,}"
    yield "bits per parameter", f"{totals.bits_per_parameter:.3f}"
    if made.top1 is None or made.data is None:
        return
    low, high = wilson_interval(made.top1.packed, made.data.n)
    images = f"{made.data.n:,} {made.data.split} images of {made.data.name or OWN_IMAGES}"
    if made.top1.dense is not None:
        yield "top-1 of the dense weights", f"{100 * made.top1.dense:.2f} %"
    yield "top-1 of this file", f"{100 * made.top1.packed:.2f} %"
    yield f"its 95 % interval, on {images}", f"{100 * low:.2f} to {100 * high:.2f} %"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {_text(key)} | {_text(value)} |" for key, value in rows]
    return "\n".join(["| figure | value |", "|---|--:|", *lines])


def _use(report: Report, repository: str, sha256: str) -> str:
    module = "" if report.origin.model else ", model=YOUR_MODULE"
    return f"""With {LIBRARY} installed:

```python
import compressor

model = compressor.load("{PREFIX}{repository}"{module})
```

```sh
compress inspect {PREFIX}{repository}
compress verify {PREFIX}{repository} --sha256 {sha256}
compress export {PREFIX}{repository} --to onnx
```

`{PREFIX}{repository}@COMMIT` always names the same bytes. All weights are in `{PACKED}`, which holds no code."""


def _made(report: Report, command: str) -> str:
    facts: Mapping[str, str] = report.origin.facts()
    told = "\n".join(f"- {name}: {_text(text)}" for name, text in facts.items() if name not in TOLD)
    again = (
        "\n\nThe recipe is in the file. This runs it again, on dense weights that it trains by its defaults unless "
        f"`--checkpoint-path` names others:\n\n```sh\n{command}\n```"
    )
    return told + (again if command else "")


def _tensors(report: Report) -> str:
    table = text_of(table_of_tensors(report.rows), "markdown")
    units = "Entropy and coded are in bits a weight, indices and codebook in bytes."
    return f"<details>\n<summary>All {len(report.rows)} shared tensors</summary>\n\n{table}\n{units}\n\n</details>"


def _text(text: str) -> str:
    """Returns a text of a file as Markdown that shows it, in one line."""
    return escaped(" ".join(text.split()), "markdown")
