"""Tables, picture and rows of the estimators experiment, from its accounts alone: a bank is enough to make them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metainfluence.evaluation import Estimate
from metainfluence.lab.experiments.bank import Account
from metainfluence.lab.experiments.judging import Judged, in_use, judged, rule
from metainfluence.lab.experiments.measures import spearman
from metainfluence.lab.experiments.results import Result, interval
from metainfluence.lab.experiments.run_methods import ESTIMATORS, SEGMENTS, TRAJECTORY
from metainfluence.lab.experiments.runs import LEFT_OUT
from metainfluence.lab.show.plots import METHOD_COLORS, clean

# Removals of at least this share of the tasks are not small.
LARGE = 0.2


def result_of(config: Any, accounts: Sequence[Account]) -> Result:
    """Everything that the experiment shows.

    Args:
      config: an `EstimatorsConfig`.
      accounts: the accounts of its trainings.
    """
    rows: list[dict[str, Any]] = []
    tables: dict[str, Any] = {}
    shown: dict[str, Judged] = {}
    for account in accounts:
        for best in (False, True):
            found = judged(account, in_use(account.scores, account.truth, best), config.draws)
            how = "each at its best option" if best else "each at its default"
            tables[f"{account.name}: agreement with retraining, {how}"] = agreement_table(found)
            rows += rows_of(account.name, how, found)
            if best:
                shown[account.name] = found
                tables[f"{account.name}: how far trajectory is ahead"] = ahead_table(found)
        if account.accuracies:
            tables[f"{account.name}: accuracy without the worst tasks"] = accuracy_table(account)
        tables[f"{account.name}: the runs"] = facts_table(account)
    tables["Promises"] = promises_table(config, accounts, shown)
    return Result(rows, tables, picture(config, shown), notes(config))


def column_name(column: str) -> str:
    """A column's name as a heading."""
    return "LOO" if column == LEFT_OUT else f"{float(column):.0%} removed"


def agreement_table(found: Judged) -> tuple[list[str], list[list[Any]]]:
    """Methods and columns, with the highest mean first."""
    columns = list(found.agreement)
    order = np.argsort(-np.mean([found.agreement[column].value for column in columns], axis=0), kind="stable")
    cells = [
        [
            f"{found.names[k]} ({found.options[k]})" if found.options[k] else found.names[k],
            *(entry(found.agreement[column], k) for column in columns),
            "–" if np.isnan(found.auc[k]) else f"{found.auc[k]:.2f}",
        ]
        for k in order
    ]
    return ["method", *map(column_name, columns), "ROC AUC"], cells


def ahead_table(found: Judged) -> tuple[list[str], list[list[Any]]]:
    """Trajectory's agreement minus that of each other method."""
    columns = list(found.ahead)
    cells = [
        [name, *(entry(found.ahead[column], k, "+") for column in columns)]
        for k, name in enumerate(found.names)
        if name != TRAJECTORY
    ]
    return ["trajectory minus", *map(column_name, columns)], cells


def entry(estimate: Estimate, index: int, sign: str = "") -> str:
    """A number with its interval."""
    value, low, high = (float(end[index]) for end in estimate)
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def accuracy_table(account: Account) -> tuple[list[str], list[list[Any]]]:
    """Means over the starts, for each method and share."""
    shares = list(dict.fromkeys(share for _, share, _ in account.accuracies))
    names = list(dict.fromkeys(name for name, _, _ in account.accuracies))
    found = {(name, share): values for name, share, values in account.accuracies}
    cells = [
        [name, *(f"{np.mean(found[name, share]):.4f}" if (name, share) in found else "–" for share in shares)]
        for name in names
    ]
    return ["worst by", *(f"{share:.0%} removed" for share in shares)], cells


def facts_table(account: Account) -> tuple[list[str], list[list[Any]]]:
    """Facts about each run."""
    names = list(account.facts[0])
    cells = [
        [f"{fact[name]:.3g}" if isinstance(fact[name], float) else str(fact[name]) for name in names]
        for fact in account.facts
    ]
    return names, cells


def rows_of(training: str, how: str, found: Judged) -> list[dict[str, Any]]:
    """One row per method."""
    rows = []
    for k, (name, option) in enumerate(zip(found.names, found.options, strict=True)):
        row: dict[str, Any] = {"training": training, "how": how, "method": name, "option": option}
        for column, estimate in found.agreement.items():
            ahead = found.ahead[column]
            for key, values in (("", estimate), ("_ahead", ahead)):
                row[f"{column}{key}"], row[f"{column}{key}_low"], row[f"{column}{key}_high"] = (
                    float(end[k]) for end in values
                )
        row["auc"] = float(found.auc[k])
        rows.append(row)
    return rows


def promises_table(
    config: Any, accounts: Sequence[Account], shown: dict[str, Judged]
) -> tuple[list[str], list[list[str]]]:
    """What was promised of these runs, and what was found, with every method at its best option."""
    cells: list[list[str]] = []

    def add(what: str, measured: str, bar: str, met: bool) -> None:
        cells.append([what, measured, bar, "met" if met else "missed"])

    for account in accounts:
        found = shown[account.name]
        others = [k for k, name in enumerate(found.names) if name != TRAJECTORY]
        for column in found.agreement:
            share = 0.0 if column == LEFT_OUT else float(column)
            values = found.agreement[column]
            where = f"{account.name}, {column_name(column)}"
            if share < LARGE:
                bar = 0.95 if column == LEFT_OUT else 0.8
                value = float(values.value[0])
                if account.name == "smooth":
                    whole = interval(*(float(end[0]) for end in values))
                    add(f"{where}: trajectory", whole, f"≥ {bar}", value >= bar)
                nearest = min(others, key=lambda k: float(found.ahead[column].low[k]))
                lead = entry(found.ahead[column], nearest, "+")
                met = bool(found.ahead[column].low[nearest] > 0)
                add(f"{where}: trajectory's lead over {found.names[nearest]}", lead, "interval above 0", met)
            else:
                ours = max(float(values.value[found.names.index(name)]) for name in (TRAJECTORY, SEGMENTS))
                theirs = max(
                    (float(values.value[k]), name) for k, name in enumerate(found.names) if name not in ESTIMATORS
                )
                add(
                    f"{where}: better of trajectory and segments against the best baseline, {theirs[1]}",
                    f"{ours:.3f}",
                    f"≥ {theirs[0]:.3f}",
                    ours >= theirs[0],
                )
    picked = [row for account in accounts for row in rule(account, best=True)]
    near = float(np.mean([row["short"] <= config.least_difference for row in picked]))
    add(
        f"the rule of `metainfluence.choose`: within {config.least_difference:g} of the best of the three",
        f"{near:.0%} of {len(picked)}",
        "≥ 80%",
        near >= 0.8,
    )
    ranks = smoothness_rank(accounts)
    if ranks is not None:
        what = f"smoothness ranks the {sum(len(each.facts) for each in accounts)} runs by trajectory's LOO (Spearman)"
        add(what, f"{ranks:.2f}", "≥ 0.7", ranks >= 0.7)
    return ["promise", "measured", "bar", ""], cells


def overall_table(
    experiments: Sequence[tuple[Any, Sequence[Account]]],
) -> tuple[list[str], list[list[str]]]:
    """What was promised of all experiments together.

    Args:
      experiments: the configuration and the accounts of each experiment.
    """
    leading, runs, picked = [], [], []
    for config, accounts in experiments:
        runs += list(accounts)
        picked += [row["short"] <= config.least_difference for each in accounts for row in rule(each, best=True)]
        leading += [
            leads(judged(each, in_use(each.scores, each.truth, best=True), config.draws))
            for each in accounts
            if each.name == "smooth"
        ]
    near = float(np.mean(picked))
    cells = [
        [
            "smooth: trajectory's LOO ≥ 0.95, its LDS at 1 % and 5 % ≥ 0.8, and ahead of every other method there",
            f"{sum(leading)} of {len(leading)} learners",
            "three of four",
            "met" if sum(leading) >= 3 else "missed",
        ],
        [
            "the rule of `metainfluence.choose` is near the best of the three",
            f"{near:.0%} of {len(picked)}",
            "≥ 80%",
            "met" if near >= 0.8 else "missed",
        ],
    ]
    ranks = smoothness_rank(runs)
    if ranks is not None:
        what = f"smoothness ranks the {sum(len(each.facts) for each in runs)} runs by trajectory's LOO (Spearman)"
        cells.append([what, f"{ranks:.2f}", "≥ 0.7", "met" if ranks >= 0.7 else "missed"])
    return ["promise", "measured", "bar", ""], cells


def leads(found: Judged) -> bool:
    """Whether trajectory, the first method, agrees as promised for small removals, and better than all others."""
    small = [column for column in found.agreement if column == LEFT_OUT or float(column) < LARGE]
    enough = [float(found.agreement[column].value[0]) >= (0.95 if column == LEFT_OUT else 0.8) for column in small]
    ahead = [bool(np.all(found.ahead[column].low[1:] > 0)) for column in small]
    return all(enough) and all(ahead)


def smoothness_rank(accounts: Sequence[Account]) -> float | None:
    """Spearman correlation over runs of smoothness and trajectory's leave-one-out agreement; None for two or fewer."""
    pairs = [
        (row["smoothness"], row[TRAJECTORY])
        for account in accounts
        for row in rule(account, best=False)
        if row["removed"] == LEFT_OUT
    ]
    if len(pairs) < 3:
        return None
    left, right = np.asarray(pairs).T
    return spearman(left, right)


def notes(config: Any) -> list[str]:
    """Explanations of the numbers."""
    data = config.setting.data
    first = (
        f"{data.num_tasks} tasks ({data.ways} ways, {data.shots} shots, {data.queries} queries) of {data.dataset}, "
        f"{config.num_steps} steps, {len(config.seeds)} starts. Everything is retrained from the same start in the "
        "same order."
    )
    columns = (
        f"LOO: Spearman correlation over {config.num_left_out} tasks; n % removed: over {config.num_subsets} subsets "
        f"that lack so many tasks (LDS); means over {config.num_targets} targets and the starts, with 95 % intervals "
        "over the tasks and subsets, which are the same for all starts."
    )
    options = (
        "The best option is that of highest mean over all columns: it is chosen by the truth, and flatters what has "
        "options. `optimum` has the automatic damping as its default, and |H| at several dampings, in units of its "
        "largest eigenvalue."
    )
    return [first, columns, options]


def picture(config: Any, shown: dict[str, Judged]) -> Figure:
    """Bars of the methods in each column, with the three estimators first."""
    figure = Figure(figsize=(9, 3.2 * len(shown)), layout="constrained")
    panels = np.ravel(np.asarray(figure.subplots(len(shown), 1, squeeze=False)))
    for axes, (training, found) in zip(panels, shown.items(), strict=True):
        columns = list(found.agreement)
        means = np.mean([found.agreement[column].value for column in columns], axis=0)
        first = [found.names.index(name) for name in ESTIMATORS if name in found.names]
        others = [k for k in np.argsort(-means, kind="stable").tolist() if k not in first]
        drawn = [*first, *others[:5]]
        width = 0.8 / len(drawn)
        for index, (k, color) in enumerate(zip(drawn, METHOD_COLORS, strict=False)):
            values = [float(found.agreement[column].value[k]) for column in columns]
            places = np.arange(len(columns)) + index * width - 0.4
            axes.bar(places, values, width, align="edge", label=found.names[k], color=color)
        axes.set_xticks(np.arange(len(columns)), [column_name(column) for column in columns])
        axes.set(title=f"{config.title}: {training}", ylabel="agreement")
        axes.legend(frameon=False, fontsize="small", ncols=2)
        clean(axes)
    return figure
