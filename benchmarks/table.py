"""Where benchmarks put their rows."""

import csv
import datetime
import sys
from pathlib import Path


def write_csv(rows: list[dict], name: str, path: Path | None = None) -> None:
    """Writes rows to `path`, or to results/<name>_<date>.csv beside this file, and says where."""
    path = path or Path(__file__).parent / "results" / f"{name}_{datetime.date.today():%Y-%m-%d}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}", file=sys.stderr)
