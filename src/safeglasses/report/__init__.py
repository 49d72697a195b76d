"""What a run found, as a validated `summary.json`, a sentence, a table and one self-contained page.

The page is written by `safeglasses.report.html.write_report`, not imported here: it brings plotly.
"""

from safeglasses.report.record import (
    Answer,
    Drive,
    Expertise,
    Firing,
    HeatMap,
    Histogram,
    NeuronCard,
    ReportData,
    SideBySide,
    Snippet,
    TradeOff,
    Trial,
    usage,
)
from safeglasses.report.schema import validate
from safeglasses.report.summary import build_summary, console_table, verdict

__all__ = [
    "Answer",
    "Drive",
    "Expertise",
    "Firing",
    "HeatMap",
    "Histogram",
    "NeuronCard",
    "ReportData",
    "SideBySide",
    "Snippet",
    "TradeOff",
    "Trial",
    "build_summary",
    "console_table",
    "usage",
    "validate",
    "verdict",
]
