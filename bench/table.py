"""Print a Markdown table of `lfm bench offline` results: python bench/table.py bench/results/*.jsonl"""

import json
import statistics
import sys
from pathlib import Path

HEADINGS = ("workload", "requests x in/out", "model", "dtype", "median s", "output tok/s", "total tok/s", "of limit")


def cells(result: dict[str, object]) -> list[str]:
    """One row: the numbers as the result file has them."""
    share, runs = result["limit_share"], result["runs_s"]
    assert isinstance(runs, list)
    return [
        str(result["workload"]),
        f"{result['requests']} x {result['input_tokens']}/{result['output_tokens']}",
        str(result["model"]),
        str(result["dtype"]),
        f"{statistics.median(runs):.3f}",
        f"{result['output_tokens_per_s']:,.0f}",
        f"{result['total_tokens_per_s']:,.0f}",
        "-" if share is None else f"{share:.1%}",
    ]


def main(paths: list[str]) -> None:
    """Print the table, then a line that says where it was measured."""
    results = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, results)]
    for row in rows:
        print(f"| {' | '.join(row)} |")
    for place in sorted(
        {f"{r['gpu'] or 'CPU'}, torch {r['torch']}, commit {(r['commit'] or 'unknown')[:12]}" for r in results}
    ):
        print(f"\nMeasured on: {place}.")


if __name__ == "__main__":
    main(sys.argv[1:])
