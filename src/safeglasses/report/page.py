"""What every page shares: one self-contained file, escaped text, and a policy that runs two known scripts.

Model output is untrusted. Text goes through jinja's autoescape, figures as escaped JSON; the page's
content policy lets nothing run but its own two scripts, named by hash, and loads embedded pictures alone.
"""

import base64
import hashlib
import re
import struct
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from safeglasses.errors import SafeglassesError
from safeglasses.report.plotting import Figure, short_kind
from safeglasses.report.record import THUMBNAIL
from safeglasses.report.summary import percent

LONGEST = 1200
"""Characters of one prompt or response on the page; the rest is counted, not shown."""
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


def fill(template: str, figures: Mapping[str, Figure], context: Mapping[str, Any]) -> str:
    """Return a page; the same input gives the same text.

    Args:
        template: a file beside this one that extends ``page.html.j2``.
        figures: by the name under which the template asks for them.
        context: what else the template asks for.
    """
    library, script = get_plotlyjs(), _asset("report.js")
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            figures=dict(figures),
            # Trusted package files; everything else is escaped.
            library=Markup(library),  # noqa: S704
            script=Markup(script),  # noqa: S704
            style=Markup(_asset("report.css")),  # noqa: S704
            hashes=Markup(f"{_script_hash(library)} {_script_hash(script)}"),  # noqa: S704
        )
    )
