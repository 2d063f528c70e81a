"""What repeated runs say together: mean ± std, paired differences, and how likely such a difference
is by chance.

Every run of an experiment is one line of JSON in a file under results/:

    {"variant": "skp", "seed": 0, "metrics": {"t2v_R@1": 41.2, …}, …}

Runs that share a seed share what chance decides (data order, first weights), so variants are
compared seed by seed: with d_s = metric(variant, s) − metric(base, s) over n seeds,

    mean d ± SE,    SE = std(d) / √n,    t = mean d / SE

Two p-values, both two-sided, for "the variant makes no difference":

    t-test      P(|T| ≥ |t|), T Student with n − 1 degrees of freedom: exact if the differences are
                normal
    sign flip   the share of all 2ⁿ ways to flip the signs of d whose |mean| is at least the one
                seen: assumes only that
                a difference is as likely as its opposite, but can never fall below 2 / 2ⁿ (5 seeds:
                0.0625)

No correction for looking at many metrics and variants: whoever reads twenty p-values will find one
below 0.05.

    python -m bench.paired         # a difference that five seeds show, and one that they do not
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cli import UserError, run  # noqa: E402

# ---- the file of runs ----------------------------------------------------------------------------


def read_runs(path: str | Path) -> list[dict]:
    """The runs recorded in a file of JSON lines; [] if there is none yet.

    Raises UserError where a line is damaged.
    """
    path, runs = Path(path), []
    if not path.exists():
        return runs
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); delete the line, its run is done again"
            ) from error
    return runs


def append_run(path: str | Path, record: dict):
    """Add one line by one write: whoever reads, or appends too, meets whole lines."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --results"
        ) from error
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def group_runs(runs: Iterable[dict], key: Callable[[dict], object]) -> list[list[dict]]:
    """The runs that may be compared with each other (equal `key`, as JSON), in order of first
    appearance.
    """
    groups: dict[str, list[dict]] = {}
    for record in runs:
        groups.setdefault(json.dumps(key(record), sort_keys=True), []).append(record)
    return list(groups.values())


# ---- statistics ----------------------------------------------------------------------------------


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test; 1 with fewer than two differences, 0 or 1 where all
    are equal.

    The distribution for whole degrees of freedom is a finite sum (Abramowitz & Stegun 26.7.3 and
    26.7.4).
    """
    n = len(differences)
    if n < 2 or not any(differences):
        return 1.0
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0
    freedom = n - 1
    angle = math.atan(
        abs(statistics.fmean(differences)) / (spread / math.sqrt(n)) / math.sqrt(freedom)
    )
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0  # cos + ⅔ cos³ + …  or  1 + ½ cos² + …
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    return max(0.0, 1.0 - inside)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of the exact sign-flip permutation test; up to 20 differences (2²⁰ ways)."""
    assert 1 <= len(differences) <= 20, f"{len(differences)} differences: 1 … 20"
    seen = abs(math.fsum(differences))
    ways = [
        abs(math.fsum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(way >= seen - 1e-9 for way in ways) / len(ways)


def by_seed(runs: Iterable[dict], variant: str, metric: str) -> dict[int, float]:
    """{seed: metric} of a variant's runs that have it; of two runs of a seed the later."""
    ours = (record for record in runs if record["variant"] == variant)
    return {
        record["seed"]: record["metrics"][metric] for record in ours if metric in record["metrics"]
    }


def paired_differences(runs: Sequence[dict], variant: str, base: str, metric: str) -> list[float]:
    """variant − base for each seed that both have, in the order of seeds."""
    ours, theirs = by_seed(runs, variant, metric), by_seed(runs, base, metric)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


# ---- tables --------------------------------------------------------------------------------------


def mean_std(values: Sequence[float]) -> str:
    """ "74.0 ± 2.0"; a single value has no ±."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def difference(values: Sequence[float]) -> str:
    """ "+5.2 ± 0.8 (p .002, .06)": mean ± standard error, p by t-test and by sign flips.

    Bold beyond 2 errors.
    """
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else "–"
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    cell = f"{mean:+.1f} ± {error:.1f}"
    cell = f"**{cell}**" if abs(mean) > 2 * error else cell
    return f"{cell} (p {_p(t_test(values))}, {_p(sign_flip_test(values))})"


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"


def markdown_tables(runs: Sequence[dict], metrics: dict[str, str], variants: Sequence[str]) -> str:
    """Two tables in Markdown: each variant's mean ± std; then, seed by seed, its differences to the
    first variant, and those of "all" to the others.

    metrics {name in the records: column heading}; variants in the order of rows.
    """

    def head(corner: str) -> list[str]:
        columns = [corner, "seeds", *metrics.values()]
        return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]

    def row(label: str, values: list[list[float]], show: Callable) -> str:
        cells = [label, str(len(values[0])), *map(show, values)]
        return f"| {' | '.join(cells)} |"

    lines = head("mean ± std")
    for variant in variants:
        values = [list(by_seed(runs, variant, metric).values()) for metric in metrics]
        lines.append(row(variant, values, mean_std))

    base, *others = variants
    pairs = {variant: (variant, base) for variant in others}
    if "all" in others:
        pairs |= {f"all − {other}": ("all", other) for other in others if other != "all"}
    if pairs:
        lines += ["", *head(f"− {base}, ± SE (p by t-test, by sign flips)")]
    for label, pair in pairs.items():
        values = [paired_differences(runs, *pair, metric) for metric in metrics]
        lines.append(row(label, values, difference))
    return "\n".join(lines)


def replace_section(path: str | Path, name: str, text: str):
    """Put `text` between the lines `<!-- name -->` and `<!-- end of name -->` of a page.

    UserError without them.
    """
    path = Path(path)
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    old = path.read_text(encoding="utf-8")
    if not old.count(start) == old.count(end) == 1:
        raise UserError(
            f"{path}: has no place for the table; add the lines {start.strip()} and {end.strip()}"
        )
    before, rest = old.split(start)
    path.write_text(
        before + start + "\n" + text + "\n\n" + end + rest.split(end)[1], encoding="utf-8"
    )


def main():
    for name, differences in (
        ("clear", [4.1, 5.0, 3.2, 6.3, 4.4]),
        ("noise", [4.1, -5.0, 3.2, -1.3, 2.4]),
    ):
        print(f"{name}: {difference(differences)}")


if __name__ == "__main__":
    run(main)
