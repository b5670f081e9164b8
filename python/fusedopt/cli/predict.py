"""``fusedopt predict``: a saved model's predictions for a table, with or without its target column."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pandas as pd

from .. import data
from . import models


def rows(args: argparse.Namespace, model: Any) -> Any:
    """The rows of the source, in the form that the model expects.

    Raises:
        ValueError: the source lacks columns that the model needs.
    """
    wanted = models.columns_of(model)
    if wanted is None:
        x = data.arrays(args.data)
        expected = models.fitted(model).n_features_in_
        if x.shape[1] != expected:
            raise ValueError(f"data: expected {expected} numbers per row, as in training, got {x.shape[1]}")
        return x
    as_text = [name for kind in ("category", "date") for name in wanted.get(kind, [])]
    header = not args.no_header
    frame = data.read(
        args.data, separator=args.separator, header=header, as_text=as_text, progress=not args.quiet
    )  # fmt: skip
    frame.columns = frame.columns.map(str).str.strip()
    names = [name for part in wanted.values() for name in part]
    if missing := [name for name in names if name not in frame.columns]:
        raise ValueError(
            f"data: the model needs the columns {', '.join(missing)}, which {args.data} lacks; "
            f"it has {', '.join(frame.columns)}"
        )
    if frame.empty:
        raise ValueError(f"data: {args.data} has no rows")
    return frame[names]


def predict(args: argparse.Namespace) -> int:
    """Writes a CSV file with one row per row of the table: ``prediction``, optionally a probability per class."""
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"output: {args.output} exists; give another name, or use --overwrite")
    model = models.load(args.model)
    if args.probabilities and not hasattr(model, "predict_proba"):
        raise ValueError("probabilities: this model has none; it predicts numbers, or was trained with --loss hinge")
    x = rows(args, model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="", encoding="utf-8") as file:  # fails before the work if not writable
        found: dict[str, Any] = {"prediction": np.asarray(model.predict(x))}
        if args.probabilities:
            found |= {f"probability of {c}": p for c, p in zip(model.classes_, model.predict_proba(x).T, strict=True)}
        pd.DataFrame(found).to_csv(file, index=False)
    print(f"{len(found['prediction']):,} predictions in {args.output}")
    return 0
