"""Draw a `ReportData` as one self-contained HTML page that needs no network.

Model output is untrusted. Text goes through jinja's autoescape, figures as escaped JSON; the page's
content policy lets nothing run but its own two scripts, named by hash, and loads embedded pictures alone.
"""

import base64
import hashlib
import re
import struct
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_text
from safeglasses.report import figures, maps
from safeglasses.report.plotting import NAMES, Figure, short_kind
from safeglasses.report.record import THUMBNAIL, Answer, ReportData
from safeglasses.report.schema import DECODINGS, DEFENCES, STAGES, validate
from safeglasses.report.status import chips, confounds, limits, worst
from safeglasses.report.summary import bands, main_rows, percent, row_of, utility_changes, verdict

LONGEST = 1200
"""Characters of one prompt or response on the page; the rest is counted, not shown."""
_STATUSES = ("fixed", "broken", "unchanged", "unscored")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PNG = b"\x89PNG\r\n\x1a\n"


def visible(text: str) -> str:
    """Replace what could not be written or could turn the page's own words around by U+FFFD; unify line ends.

    That is control characters, lone surrogates, and bidirectional embeddings, overrides and isolates.
    """
    return _HIDDEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def address(neuron: str) -> Markup:
    """Escape a neuron's address and let it break where a reader would."""
    text = str(escape(visible(neuron)))
    return Markup(text.replace(".", ".<wbr>").replace(":", "<wbr>:").replace("#", "<wbr>#"))  # noqa: S704


def shorten(text: str, limit: int = LONGEST) -> str:
    """Cut text after `limit` characters and say how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def data_uri(picture: bytes) -> str:
    """Embed a PNG thumbnail.

    Raises:
        SafeglassesError: not a PNG, or more than 64 pixels a side.
    """
    if picture[:8] != _PNG or picture[12:16] != b"IHDR":
        raise SafeglassesError(
            "report pictures are PNG thumbnails",
            given=repr(picture[:16]),
            do="make them with safeglasses.report.interpret.thumbnail",
        )
    width, height = struct.unpack(">II", picture[16:24])
    if max(width, height) > THUMBNAIL:
        raise SafeglassesError(
            "report picture is too large",
            given=f"{width} × {height} pixels",
            expected=f"at most {THUMBNAIL} a side",
            do="make them with safeglasses.report.interpret.thumbnail",
        )
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _finalize(value: object) -> object:
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


@cache
def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("safeglasses", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    env.filters |= {
        "address": address,
        "percent": percent,
        "shorten": shorten,
        "data_uri": data_uri,
        "kind": short_kind,
    }
    return env


def _asset(name: str) -> str:
    return resources.files("safeglasses.report").joinpath(name).read_text(encoding="utf-8")


def _script_hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _figures(data: ReportData) -> dict[str, Figure]:
    drawn: dict[str, Figure | None] = {"harm": figures.harm(data.summary)}
    if data.heat is not None:
        drawn |= {"experts": maps.experts_map(data.heat), "strength": maps.strength_map(data.heat)}
    drawn |= {f"auroc-{i}": maps.auroc(h) for i, h in enumerate(data.histograms)}
    if data.trade_off is not None:
        drawn |= {
            "trade-utility_lost": figures.trade_off(data.trade_off, "utility_lost"),
            "trade-kl": figures.trade_off(data.trade_off, "kl"),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _cells(data: ReportData) -> list[dict[str, Any]]:
    """One entry per defence: its harmful rate in every band, None where not measured."""
    table = []
    for defence in DEFENCES:
        rows = [row_of(data.summary, defence, c, d) for c, d in bands(data.summary)]
        if any(rows):
            rates = [row["harmful_rate"] if row else None for row in rows]
            table.append({"defence": defence, "name": NAMES[defence], "rates": rates})
    return table


def _answer(answer: Answer) -> str:
    return {True: "harmful", False: "harmless", None: "unscored"}[answer.harmful]


def _context(data: ReportData) -> dict[str, Any]:
    summary = data.summary
    before, after = main_rows(summary)
    slots = sorted({slot for row in summary["rows"] for slot in row["utility"] or {}})
    counts = {s: sum(r.status == s for r in data.responses) for s in _STATUSES}
    lights = confounds(summary)
    return {
        "data": data,
        "summary": summary,
        "verdict": verdict(summary).replace(" %", "\u00a0%"),
        "chips": chips(summary),
        "before": before,
        "after": after,
        "changes": utility_changes(before, after) if before and after else {},
        "harm_table": _cells(data),
        "bands": bands(summary),
        "decodings": DECODINGS,
        "beside": [NAMES[d] for d in ("aura", "sgm") if any(r["defence"] == d for r in summary["rows"])],
        "names": NAMES,
        "slots": slots,
        "costs": [row for d in DECODINGS for k in DEFENCES if (row := row_of(summary, k, "all", d)) is not None],
        "confounds": lights,
        "confound_level": worst([c.level for c in lights]),
        "statuses": {s: n for s, n in counts.items() if n},
        "verdict_of": _answer,
        "limits": (*data.not_verified, *limits(summary)),
        "stages": STAGES,
        "figures": _figures(data),
    }


def render(data: ReportData) -> str:
    """Return the page; the same record gives the same text.

    Raises:
        SafeglassesError: the summary breaks its schema, or a picture is no thumbnail.
    """
    validate(data.summary)
    library, script = get_plotlyjs(), _asset("report.js")
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            **_context(data),
            # Trusted package files; everything else is escaped.
            library=Markup(library),  # noqa: S704
            script=Markup(script),  # noqa: S704
            style=Markup(_asset("report.css")),  # noqa: S704
            hashes=Markup(f"{_script_hash(library)} {_script_hash(script)}"),  # noqa: S704
        )
    )


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page atomically and return its path.

    Raises:
        SafeglassesError: see `render`.
    """
    atomic_write_text(path, render(data))
    return path
