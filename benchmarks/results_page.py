"""Makes the tables, the readings and the figures of ``docs/results.md`` from the committed rows; measures nothing.

    python benchmarks/results_page.py

A test fails where the page or a figure is not what the rows say, so run it after ``zoo.py``, ``rate_accuracy.py``,
``post_training.py``, ``allowed_weights.py`` and ``peers.py``. Published numbers are those of ``literature.toml``.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import allowed_weights_page
import click
import peers_page
import post_training_page
import sizes_page
from page import put

__all__ = ["FIGURES", "PAGE", "figures", "parts"]

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
README = HERE.parent / "README.md"
FIGURES = HERE.parent / "docs" / "figures"
LITERATURE = HERE / "literature.toml"


def rows_of(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a benchmark; none where it has not been run."""
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dense_top1() -> dict[str, float]:
    """Returns top-1 of the dense networks on the test images."""
    return {row["net"]: row["top1"] for row in rows_of("rate_accuracy") if row["target"] == 0}


def parts() -> dict[str, str]:
    """Returns the generated parts of the page by the names of their markers."""
    allowed, peers, dense = rows_of("allowed_weights"), rows_of("peers"), dense_top1()
    made = {"sizes": sizes_page.table(rows_of("rate_accuracy"))}
    made["zoo"] = zoo()
    made["post_training summary"] = post_training_page.tables(rows_of("post_training"))["summary"]
    made |= {"peers": peers_page.table(peers), "peers reading": peers_page.reading(peers), "literature": literature()}
    for net in allowed_weights_page.NETS:
        made[f"allowed_weights {net}"] = allowed_weights_page.table(allowed, net)
        made[f"allowed_weights {net} outcomes"] = allowed_weights_page.outcomes(allowed, net)
        made[f"allowed_weights {net} reading"] = allowed_weights_page.reading(allowed, net, dense[net])
    return made


def zoo() -> str:
    """Returns the table of the smallest checkpoints of the zoo, as ``zoo.py`` has written it into the README."""
    found = re.search(r"<!-- zoo -->\n(.*?)\n<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def figures() -> dict[str, Any]:
    """Returns what each figure shows, by its name."""
    return {
        "allowed_weights.png": allowed_weights_page.points(rows_of("allowed_weights"), dense_top1()),
        "peers.png": peers_page.points(rows_of("peers")),
        "sizes.png": sizes_page.points(rows_of("rate_accuracy"), rows_of("post_training")),
    }


def literature() -> str:
    """Returns the published numbers as a Markdown table."""
    lines = ["| network, data | method | dense | compressed | size | source |", "|---|---|--:|--:|---|---|"]
    for row in tomllib.loads(LITERATURE.read_text(encoding="utf-8"))["row"]:
        cells = [row[name] for name in ("network", "method", "dense", "compressed", "size", "source")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Rewrites the page and the figures."""
    for name, text in parts().items():
        put(name, text, PAGE)
    allowed_weights_page.draw(rows_of("allowed_weights"), dense_top1(), FIGURES / "allowed_weights.png")
    peers_page.draw(rows_of("peers"), FIGURES / "peers.png")
    sizes_page.draw(rows_of("rate_accuracy"), rows_of("post_training"), FIGURES / "sizes.png")


if __name__ == "__main__":
    main()
