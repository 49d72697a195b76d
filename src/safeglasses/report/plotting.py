"""What all figures share: plain plotly dictionaries whose colours are tokens.

A token such as ``@glasses`` stands for the page's CSS variable of the same name, so that figures follow light
and dark mode. Text that plotly would read as its own markup is escaped by whoever writes it.
"""

from typing import Any

Figure = dict[str, Any]
NAMES = {"none": "without glasses", "aura": "AurA", "sgm": "SGM, parameter-free", "glasses": "with glasses"}
"""What a reader calls each defence."""
LEGEND: Figure = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": 1.0,
    "yanchor": "bottom",
    "font": {"size": 13},
}


def axis(title: str = "", **more: Any) -> Figure:
    """Make an axis in the page's style; `more` goes to plotly as it is."""
    return {
        "gridcolor": "@grid",
        "zerolinecolor": "@line",
        "linecolor": "@line",
        "tickcolor": "@line",
        "automargin": True,
        "fixedrange": True,
        "title": {"text": title, "standoff": 10, "font": {"size": 13, "color": "@muted"}},
        **more,
    }


def layout(height: int, xaxis: Figure, yaxis: Figure, **more: Any) -> Figure:
    """Make a transparent layout of a given height in pixels; `more` goes to plotly as it is."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8, "autoexpand": True},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "@ink"},
        "hoverlabel": {"bgcolor": "@raised", "bordercolor": "@line", "font": {"color": "@ink"}},
        "showlegend": False,
        "xaxis": xaxis,
        "yaxis": yaxis,
        **more,
    }


def short_kind(kind: str) -> str:
    """Shorten ``mlp.up_proj:out`` to ``up_proj``; input sides keep their mark, sites beyond the decoder their place."""
    path, _, side = kind.rpartition(":")
    leaf = path.rsplit(".", 1)[-1]
    if path.startswith("/"):  # /model.vision_tower.layers.mlp.fc1: /vision_tower…fc1
        parts = path[1:].split(".")
        leaf = f"/{parts[parts[0] == 'model' and len(parts) > 2]}…{leaf}"
    return leaf if side == "out" else f"{leaf}:{side}"
