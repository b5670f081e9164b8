"""Columns of a table: their kinds, and their conversion to numbers and categories. Needs pandas.

The kinds are determined once, on the whole table. The conversions (:func:`numbers`, :func:`dates`, :func:`categories`)
are not fitted to the data. They are part of a saved model, which applies them to every table it predicts. Medians,
scales and known categories are fitted by scikit-learn's transformers in ``cli/models.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "?"})
"""Texts, in lower case, that mark a missing value in a feature."""

USED = ("number", "date", "category")
"""The kinds of column that a model is trained on."""

DATE_FORMATS = {
    "ISO8601": "2024-12-31",
    "%d.%m.%Y": "31.12.2024",
    "%m/%d/%Y": "12/31/2024",
    "%d/%m/%Y": "31/12/2024",
    "%d-%m-%Y": "31-12-2024",
}
"""Format of ``pandas.to_datetime`` -> example. If several formats match, the first one is used."""

_INDEX_NAMES = re.compile(r"(unnamed: \d+|index|id|row|row[ _]?(id|number))", re.IGNORECASE)
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([T ].*)?")
_CURRENCY = r"[$€£¥]?\s?"
# Separators of thousands and decimals: 1,234.5 or 1.234,5.
_POINT = re.compile(rf"[+-]?{_CURRENCY}(\d{{1,3}}(,\d{{3}})+|\d+)?(\.\d*)?([eE][+-]?\d+)?\s?[%€£]?")
_COMMA = re.compile(rf"[+-]?{_CURRENCY}(\d{{1,3}}(\.\d{{3}})+|\d+)?(,\d*)?\s?[%€£]?")


@dataclass(frozen=True)
class Column:
    """How one column is interpreted."""

    name: str
    kind: str
    """``number``, ``date`` or ``category`` if it is used; else ``index``, ``identifier``, ``constant`` or ``empty``.

    For the target ``target: n classes`` or ``target: number``.
    """
    missing: int
    example: str
    note: str = ""
    how: str = ""
    """The format of a date; ``comma`` for numbers with a decimal comma."""


def understand(frame: pd.DataFrame) -> list[Column]:
    """Determines the kind of every column."""
    return [_understand(str(name), frame[name]) for name in frame.columns]


def _understand(name: str, values: pd.Series) -> Column:
    known = values.dropna()
    if not is_number(values) and not is_date(values):
        known = texts(values).dropna()
    missing, example = len(values) - len(known), str(known.iloc[0]) if len(known) else ""
    distinct = pd.Series(known.unique())
    if not len(known):
        return Column(name, "empty", missing, example, "not used")
    if len(distinct) == 1 and not missing:
        return Column(name, "constant", missing, example, "not used")
    if is_number(values):
        if _INDEX_NAMES.fullmatch(name) and not missing and len(distinct) == len(values) and (values % 1 == 0).all():
            return Column(name, "index", missing, example, "not used: row numbers")
        return Column(name, "number", missing, example)
    if is_date(values):
        return Column(name, "date", missing, example)
    if style := number_style(distinct):
        odd = distinct[pd.to_numeric(distinct, errors="coerce").isna()][:1]
        note = f"{odd.iloc[0]} is read as {parse_numbers(odd, style).iloc[0]:g}" if len(odd) else ""
        return Column(name, "number", missing, example, note, "comma" if style == "comma" else "")
    if found := date_formats(distinct):
        note = f"read as {DATE_FORMATS[found[0]]}; {DATE_FORMATS[found[1]]} also matches" if found[1:] else ""
        return Column(name, "date", missing, example, note, found[0])
    if len(distinct) == len(known) >= 20:
        return Column(name, "identifier", missing, example, "not used: a different text in every row")
    return Column(name, "category", missing, example, f"{len(distinct):,} categories")


# ---- conversions, applied by a model to every table


def numbers(frame: pd.DataFrame, comma: Sequence[str] = ()) -> np.ndarray[Any, Any]:
    """Converts columns of numbers to float64; missing values become NaN.

    Args:
        frame: numbers, booleans or texts such as ``1,000``, ``5%`` and ``$3.50``.
        comma: names of columns whose texts use a decimal comma.

    Raises:
        ValueError: a text is not a number, or a number is infinite; the message names the column.
    """
    out = np.empty(frame.shape)
    for i, name in enumerate(frame.columns):
        values = frame[name]
        if is_number(values) or pd.api.types.is_bool_dtype(values):
            out[:, i] = values.astype("float64") if values.isna().any() else values
        else:
            known = texts(values)
            parsed = parse_numbers(known, "comma" if name in comma else "point")
            if (wrong := known[parsed.isna() & known.notna()]).size:
                raise ValueError(f"column {name!r}: expected numbers, got {wrong.iloc[0]!r}")
            out[:, i] = parsed
        if np.isinf(out[:, i]).any():
            raise ValueError(f"column {name!r}: expected finite numbers, got infinity")
    return out


DATE_PARTS = ("days", "day of the year", "weekday", "hour")


def dates(frame: pd.DataFrame, formats: Mapping[str, str]) -> np.ndarray[Any, Any]:
    """Converts each column of dates to four numbers: days since 1970, day of the year, weekday, hour; or NaN.

    Args:
        frame: dates or texts; missing values become NaN.
        formats: column -> format of its texts for ``pandas.to_datetime``.

    Raises:
        ValueError: a text has another format; the message names the column.
    """
    parts = []
    for name in frame.columns:
        values = frame[name]
        known = values if is_date(values) else texts(values)
        form = None if is_date(values) else formats.get(name, "ISO8601")
        moments = pd.to_datetime(known, utc=True, format=form, errors="coerce")
        if (wrong := known[moments.isna() & known.notna()]).size:
            example = DATE_FORMATS[form or "ISO8601"]
            raise ValueError(f"column {name!r}: expected dates such as {example}, got {wrong.iloc[0]!r}")
        days = (moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
        parts += [days, moments.dt.day_of_year, moments.dt.day_of_week, moments.dt.hour]
    return np.column_stack([np.asarray(part, dtype=float) for part in parts])


def categories(frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Converts columns of categories to texts, also from booleans and numbers; missing values become None."""
    out = np.empty(frame.shape, object)
    for i, name in enumerate(frame.columns):
        known = texts(frame[name])
        out[:, i] = known.astype(object).where(known.notna(), None)
    return out


# ---- single columns


def is_number(values: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values))


def is_date(values: pd.Series) -> bool:
    return bool(pd.api.types.is_datetime64_any_dtype(values))


def texts(values: pd.Series, missing: frozenset[str] = MISSING) -> pd.Series:
    """The values as stripped texts; missing ones become NA. The text of an integer has no decimal point."""
    if is_number(values):
        whole = values.dropna() % 1 == 0
        if whole.all():
            values = values.astype("Int64")
    codes, distinct = pd.factorize(values)  # each distinct text is processed once
    known = pd.Series(distinct).astype("string").str.strip()
    known = known.mask(known.str.lower().isin(missing))
    return pd.Series(known.array.take(codes, allow_fill=True), index=values.index, name=values.name)


def number_style(distinct: pd.Series) -> str:
    """The number format of these texts: ``plain`` (Python's), ``point`` or ``comma``; empty if one is no number."""
    for sample in (distinct[:100], distinct):
        if pd.to_numeric(sample, errors="coerce").notna().all():
            found = "plain"
        elif _all_match(_POINT, sample):
            found = "point"
        elif _all_match(_COMMA, sample):
            found = "comma"
        else:
            return ""
    return found


def parse_numbers(values: pd.Series, style: str) -> pd.Series:
    """Converts texts to float64; missing values and texts that are not numbers become NaN."""
    parsed = pd.to_numeric(values, errors="coerce").astype("float64")
    rest = values[parsed.isna() & values.notna()]
    if style != "plain" and len(rest):
        pattern, thousands, decimal = (_COMMA, ".", ",") if style == "comma" else (_POINT, ",", ".")
        if style == "comma":
            rest = values.dropna()  # 1.000 means one thousand
        rest = rest[rest.str.fullmatch(pattern.pattern)]
        digits = rest.str.replace(thousands, "", regex=False).str.replace(decimal, ".", regex=False)
        parsed[rest.index] = pd.to_numeric(digits.str.replace(r"[$€£¥%\s]", "", regex=True), errors="coerce")
    return parsed


def _all_match(pattern: re.Pattern[str], values: pd.Series) -> bool:
    return bool((values.str.fullmatch(pattern.pattern) & values.str.contains(r"\d")).all())


def date_formats(distinct: pd.Series) -> list[str]:
    """The date formats that all these texts match."""
    found = list(DATE_FORMATS)
    for sample in (distinct[:100], distinct):
        if not sample.str.fullmatch(_DATE.pattern).all():
            return []
        found = [one for one in found if pd.to_datetime(sample, format=one, utc=True, errors="coerce").notna().all()]
    return found
