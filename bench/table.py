"""The README's table of `lfm bench offline` results, from the newest result of each workload and precision.

python bench/table.py            print it
python bench/table.py --write    put it between the markers in README.md
python bench/table.py --check    exit 1 unless README.md holds exactly it (`make check` runs this)

Newest is by file name: result files begin with their date. Rivals and goals are not in it: a result stands for itself.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- bench/table.py begins -->", "<!-- bench/table.py ends -->"
HEADINGS = ("workload", "requests x in/out", "precision", "median s", "output tok/s", "total tok/s", "of limit")
Result = dict[str, object]


def newest(paths: list[Path]) -> list[Result]:
    """The newest result of each workload and precision on a GPU, in the order of the files they first appear in."""
    found: dict[tuple[object, ...], Result] = {}
    for path in sorted(paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["gpu"] is not None:
                found[tuple(result[key] for key in ("model", "workload", "quantize", "kv_dtype", "gpu"))] = result
    return list(found.values())


def cells(result: Result) -> list[str]:
    """One row: the numbers as the result file has them."""
    share, runs, quantize = result["limit_share"], result["runs_s"], result["quantize"]
    assert isinstance(runs, list)
    return [
        str(result["workload"]),
        f"{result['requests']} x {result['input_tokens']}/{result['output_tokens']}",
        str(result["dtype"] if quantize == "none" else quantize),
        f"{statistics.median(runs):.3f}",
        f"{result['output_tokens_per_s']:,.0f}",
        f"{result['total_tokens_per_s']:,.0f}",
        "-" if share is None else f"{share:.1%}",
    ]


def table(results: list[Result]) -> str:
    """The Markdown table and a line that says where it was measured."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *map(cells, results)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    places = {f"{r['gpu']}, {r['model']}, torch {r['torch']}, triton {r['triton']}" for r in results}
    return "\n".join([*lines, "", "Measured on: " + "; ".join(sorted(places)) + "."])


def readme_with(text: str, content: str) -> str:
    """The README with the table between its markers. Raises ValueError if they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(args: list[str]) -> int:
    """Print, write or check the table."""
    content = table(newest(list((ROOT / "bench" / "results").glob("*_h200_*.jsonl"))))
    if not args:
        print(content)
        return 0
    if args not in (["--write"], ["--check"]):
        print(f"table.py {' '.join(args)}: not known. Allowed: --write, --check.", file=sys.stderr)
        return 2
    text = README.read_text(encoding="utf-8")
    wanted = readme_with(text, content)
    if args == ["--write"]:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print("README.md is behind bench/results. Run: python bench/table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
