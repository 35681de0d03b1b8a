"""One look for every figure: theme, colours that belong to methods, and saving with provenance."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ofutils import params
from ofutils.records import write_atomically

# From Okabe and Ito's palette, told apart also without full colour vision. SOAP: the block's hue, lighter and dashed.
COLORS = {
    "vanilla": "#000000",
    "clipped softmax": "#E69F00",
    "gated attention": "#0072B2",
    "OP": "#009E73",
    "vanilla + SOAP": "#7F7F7F",
    "OP + SOAP": "#66C2A5",
}
DASHES = {name: (3, 1.5) if "SOAP" in name else (None, None) for name in COLORS}


def theme() -> None:
    """Set the look of all figures and printed tables that follow."""
    pd.set_option("display.width", 140, "display.max_colwidth", 90)
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9)
    plt.style.use("ofutils.figures")


def log_scale(ax: Axes, which: str) -> None:
    """A logarithmic `x` or `y` axis with plain numbers at 1, 2 and 5 of each decade (1 alone over many)."""
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    ax.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def dots(ax: Axes, table: pd.DataFrame, number: str, name: str, title: str, label: str) -> None:
    """A dot per row of a table: `number` across, a line for each `name`; `label` is of the horizontal axis."""
    sns.stripplot(table, x=number, y=name, color="#0072B2", jitter=False, size=7, alpha=0.7, ax=ax)
    ax.set(title=title, xlabel=label, ylabel="")
    ax.grid(axis="y", alpha=0.3)


def save(fig: Figure, session: params.Session, name: str, points: pd.DataFrame, **provenance) -> Path:
    """Write a figure into the session's folder: the picture, its points as CSV, its provenance as JSON.

    Args:
        fig: the figure.
        session: of the notebook; its provenance goes into the JSON file.
        name: file name without an ending.
        points: what is drawn.
        provenance: more to record, e.g. the corpus' sha256.

    Returns:
        The path of the picture.
    """
    picture = save_table(session, name, points, **provenance).with_suffix(".png")
    write_atomically(picture, lambda path: fig.savefig(path, format="png", metadata={"Software": None}))
    return picture


def save_table(session: params.Session, name: str, points: pd.DataFrame, **provenance) -> Path:
    """Write a table into the session's folder: CSV, and its provenance as JSON. Returns the CSV's path."""
    table = session.folder / f"{name}.csv"
    described = json.dumps(session.provenance(**provenance), indent=1) + "\n"
    write_atomically(table, lambda path: points.to_csv(path, index=False, float_format="%.6g"))
    write_atomically(table.with_suffix(".json"), lambda path: path.write_text(described))
    return table
