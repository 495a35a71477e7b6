"""Pictures by matplotlib, as SVG that follows the colours of a page, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from compressor.formats.errors import MissingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "ORANGE", "TEAL", "Picture"]

BLUE, ORANGE, TEAL, GREY = "#3b82c4", "#d97a26", "#2a9d8f", "#8a8a8a"  # seen on white and on black
INK = "#010203"  # stands for the colour of the page's text
SETTINGS = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 12.0, "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "svg.hashsalt": "compressor",
    "text.parse_math": False, "axes.axisbelow": True,
}  # fmt: skip
DOTS = 160  # of an inch, in PNG


class Picture:
    """A picture of one or several axes.

    Args:
        title: what it shows, for those who cannot see it, and for its file.
        draw: draws on the axes.
        size: width and height in inches, of 72 pixels on a page.
        rows: number of axes, one below the other, which share their x.

    Raises:
        MissingError: matplotlib is not installed.
    """

    def __init__(
        self, title: str, draw: Callable[[Figure, list[Axes]], None], size: tuple[float, float], rows: int = 1
    ) -> None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as exc:
            raise MissingError(f"pictures need matplotlib ({exc}): pip install 'timm-compressor[report]'") from exc
        self.title, self._draw, self._size, self._rows = title, draw, size, rows

    def svg(self, prefix: str) -> str:
        """Returns an ``<svg>`` element to stand in a page.

        Args:
            prefix: of its ids, which must differ from those of all other pictures of the page.
        """
        text = self._saved("svg").decode()
        text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text).replace(INK, "currentColor")
        width, height = (round(72 * side) for side in self._size)
        return re.sub(
            r"<svg [^>]*>",
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" width="{width}" '
            f'role="img" aria-hidden="true">',
            text,
            count=1,
        )

    def png(self) -> bytes:
        """Returns the picture as a PNG, on white."""
        return self._saved("png")

    def _saved(self, kind: str) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        file = io.BytesIO()
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            matplotlib.rcdefaults()  # whatever the user's matplotlibrc says, the same files give the same bytes
            matplotlib.rcParams.update(SETTINGS)  # type: ignore[arg-type]
            figure = Figure(self._size, layout="constrained")
            axes = figure.subplots(self._rows, 1, sharex=True, squeeze=False)
            self._draw(figure, [row[0] for row in axes])
            if kind == "png":
                figure.savefig(file, format="png", dpi=DOTS, facecolor="white")
            else:
                figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()
