"""The report of the studies, drawn from what they stored; nothing is trained.

    pip install -c constraints.txt -e '.[studies]'
    python -m benchmarks.report [--output docs/studies]

reads `cells.jsonl` of `zero_shot`, `family` and `mtop6`, and writes plots as SVG and `tables.md`. A part whose cells
are not there yet is left out, and named. The last line is JSON, one goal for each question that is answered.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import plots, study
from benchmarks.family import run as family_study
from benchmarks.mtop6 import run as mtop6_study
from benchmarks.trainings import Settings
from benchmarks.zero_shot import averages
from benchmarks.zero_shot import run as zero_shot_study

HERE = pathlib.Path(__file__).resolve().parent
Row = Mapping[str, Any]
BySeed = Mapping[tuple[str, str, str], Mapping[int, float]]  # (point, method, setting)
FORMS = ("test", "language_off", "task_off")


def seeds(store: study.Store) -> list[int]:
    """Those of the cells that are done."""
    return sorted({cell["config"].get("seed", 0) for cell in store.cells()})


def by_seed(rows: Sequence[Row]) -> BySeed:
    """Each seed's mean over the datasets of a setting."""
    groups: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        key = (row["point"], row["method"], row["setting"])
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row["value"])
    return {
        key: {seed: statistics.fmean(values) for seed, values in sorted(seeds.items())}
        for key, seeds in groups.items()
    }


def scores(rows: Sequence[Row]) -> plots.Scores:
    """The same without the seeds' names, in their order."""
    return {key: list(values.values()) for key, values in by_seed(rows).items()}


def table(found: plots.Scores, settings: Sequence[str]) -> str:
    """A block of Markdown for each point: methods down, settings across."""
    blocks = []
    for point in plots.distinct(point for point, _, _ in found):
        lines = [
            f"| {point} | " + " | ".join(settings) + " | seeds |",
            "|---" * (len(settings) + 2) + "|",
        ]
        for method in plots.distinct(method for at, method, _ in found if at == point):
            values = [found.get((point, method, setting), ()) for setting in settings]
            seeds = max(map(len, values))
            lines.append(f"| {method} | " + " | ".join(map(study.mean, values)) + f" | {seeds} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


# The parts. Each writes its plots, and returns its Markdown and its goals.

Part = tuple[str, list[dict[str, Any]]]


def zero_shot(output: pathlib.Path) -> Part:
    """The map of where which method wins, what features hold, and the question whether FLix beats LoRA."""
    store = study.Store(HERE / "zero_shot" / "cells.jsonl")
    plan = zero_shot_study.Plan(
        list(zero_shot_study.POINTS),
        list(zero_shot_study.METHODS),
        seeds(store),
        store,
        Settings(pathlib.Path()),
    )
    rows = zero_shot_study.rows(plan)
    if not rows:
        return "", []
    found = scores(rows)
    plots.draw_bars(found, output / "zero_shot.svg")
    places = {
        point: (f"base: {base}", f"rank {rank}")
        for point, (base, rank) in zero_shot_study.POINTS.items()
    }
    plots.draw_leaders(found, places, output / "zero_shot_map.svg")
    cells = [(cell, gave) for cell in plan.chosen() if (gave := plan.found(cell))]
    settings = {f"{row['task']} {row['language']}": row["setting"] for row in rows}
    parts = ["## Zero-shot", table(found, list(plots.SETTINGS)), _switched(cells, settings)]
    parts.append(_averages(cells))
    parts.append(_norms(cells, output))
    ours = {name for _, name, _ in found if name.startswith("flix")}
    each = by_seed(rows)
    return "\n\n".join(filter(None, parts)), [
        *_question(each, "FLix over LoRA of the same compute, seen", "seen", {"flix"}, {"lora"}),
        *_question(
            each,
            "FLix over LoRA of the same compute, unseen pair",
            "unseen_pair",
            {"flix"},
            {"lora"},
        ),
        *_question(
            each,
            "the best FLix over the best of LoRA and task only, unseen pair",
            "unseen_pair",
            ours,
            {"lora", "lora_wide", "task_only"},
        ),
        *_question(
            each,
            "feature dropout over none, unseen pair",
            "unseen_pair",
            {"flix"},
            {"flix_no_dropout"},
        ),
        *_question(each, "a shared feature over none, seen", "seen", {"flix_shared"}, {"flix"}),
    ]


def _question(
    found: BySeed, name: str, setting: str, ours: set[str], theirs: set[str]
) -> list[dict[str, Any]]:
    """A goal: the mean over points of the best of ours less the best of theirs, in points of exact match, of the seeds
    that both have.

    `error` is its standard error, from the differences of each seed, None where a point has one. It `holds` if the
    value is above 0 by two of them.
    """
    gaps: list[dict[int, float]] = []
    for point in plots.distinct(point for point, _, _ in found):
        mine, other = (_best(found, point, setting, side) for side in (ours, theirs))
        if shared := sorted(mine.keys() & other.keys()):
            gaps.append({seed: mine[seed] - other[seed] for seed in shared})
    if not gaps:
        return []
    value = statistics.fmean(statistics.fmean(gap.values()) for gap in gaps)
    points = f"{len(gaps)} point{'s' * (len(gaps) > 1)}"
    error = None
    if min(map(len, gaps)) > 1:
        if all(gap.keys() == gaps[0].keys() for gap in gaps):  # a seed may be lucky at all points
            gaps = [{s: statistics.fmean(gap[s] for gap in gaps) for s in gaps[0]}]
        variances = [statistics.variance(gap.values()) / len(gap) for gap in gaps]
        error = sum(variances) ** 0.5 / len(gaps)
    return [
        {
            "name": f"{name} ({points})",
            "value": round(value, 2),
            "goal": "> 0 by two standard errors",
            "holds": error is not None and value > 2 * error,
            "error": error if error is None else round(error, 2),
        }
    ]


def _best(found: BySeed, point: str, setting: str, side: set[str]) -> Mapping[int, float]:
    """The best mean of some methods; of one seed only where none has several, as on the map."""
    here = [v for (at, m, of), v in found.items() if (at, of) == (point, setting) and m in side]
    several = [values for values in here if len(values) > 1]
    return max(several or here, key=lambda values: statistics.fmean(values.values()), default={})


Chosen = Sequence[tuple[zero_shot_study.Cell, study.Found]]


def _switched(cells: Chosen, settings: Mapping[str, str]) -> str:
    """What is left of parses when the language, or the task, is off: by point and method, over seeds."""
    columns = [(s, form) for s in ("seen", "unseen_pair") for form in FORMS]
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for cell, gave in cells:
        if all(form in gave for form in FORMS):
            into = found.setdefault((cell.point, cell.method), {key: [] for key in columns})
            for setting, form in columns:
                names = [n for n in gave[form] if n.startswith("parse ") and settings[n] == setting]
                into[setting, form].append(statistics.fmean(gave[form][name] for name in names))
    if not found:
        return ""
    names = [f"{plots.SETTINGS[setting]}: {form.replace('_', ' ')}" for setting, form in columns]
    lines = ["| point | method | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (point, method), values in found.items():
        shown = " | ".join(study.mean(values[key]) for key in columns)
        lines.append(f"| {point} | {method} | {shown} |")
    return "Parses with features off:\n\n" + "\n".join(lines)


def _averages(cells: Chosen) -> str:
    """What the mean of other languages' modules does where the own one was not trained with the task."""
    shown = averages.table(study.Store(HERE / "zero_shot" / "averages.jsonl"), cells)
    return shown and "Other languages' modules in place of the dataset's own:\n\n" + shown


def _norms(cells: Chosen, output: pathlib.Path) -> str:
    """FLix's norms at the first point that has them, mean over seeds."""
    known = [(c, gave["norms"]) for c, gave in cells if c.method == "flix" and "norms" in gave]
    if not known:
        return ""
    point = known[0][0].point
    norms = [found for cell, found in known if cell.point == point]
    layers = list(norms[0])
    modules = plots.distinct(module for layer in layers for module in norms[0][layer])
    values = {
        m: [statistics.fmean(of[layer].get(m, 0.0) for of in norms) for layer in layers]
        for m in modules
    }
    title = f"norm of each feature's update, {point}"
    plots.draw_heat(values, layers, title, output / "feature_norms.svg")
    return (
        f"The norms of FLix's updates at {point}, mean of {len(norms)} seeds: `feature_norms.svg`."
    )


def family(output: pathlib.Path) -> Part:
    """Many tasks at once, zero-shot, few-shot: tables, plots and the questions of the family."""
    store = study.Store(HERE / "family" / "cells.jsonl")
    plan = family_study.Plan(
        list(family_study.METHODS),
        list(family_study.WAYS),
        seeds(store),
        store,
        Settings(pathlib.Path()),
    )
    rows = family_study.rows(plan)
    if not rows:
        return "", []
    many = [row for row in rows if row["point"] == "many" and row["setting"] != "unseen_task"]
    few = [row for row in rows if row["point"] != "many"]
    parts = ["## The family", table(scores(many), list(plots.SETTINGS))]
    trained = {
        cell.name_of: gave
        for cell in plan.chosen()
        if not cell.shots and (gave := plan.found(cell))
    }
    seen = {
        m: statistics.fmean(v) for (_, m, setting), v in scores(many).items() if setting == "seen"
    }
    score = "exact match on seen datasets, %"
    plots.draw_scatter(
        {m: (trained[m]["trained"], y) for m, y in seen.items()},
        "trained parameters",
        score,
        output / "parameters.svg",
        True,
    )
    step = {m: trained[m]["training_seconds"] / trained[m]["steps"] for m in seen}
    plots.draw_scatter(
        {m: (step[m], y) for m, y in seen.items()},
        "seconds of training by the clock, each step",
        score,
        output / "step_time.svg",
        False,
    )
    routing = trained.get("polytropon", {}).get("routing")
    if routing:
        skills = [f"skill {i}" for i in range(len(next(iter(routing.values()))))]
        weights = {dataset.partition("_")[2]: shares for dataset, shares in routing.items()}
        title = "Polytropon's routing, mean over layers"
        plots.draw_heat(weights, skills, title, output / "routing.svg")
    goals: list[dict[str, Any]] = []
    if few:
        each = by_seed([{**row, "setting": "new"} for row in few])
        means = {(at, method): list(values.values()) for (at, method, _), values in each.items()}
        for target in plots.distinct(point.partition(",")[0] for point, _ in means):
            lines: dict[str, list[tuple[float, float]]] = {}
            for (point, method), values in means.items():
                if point.startswith(target + ","):
                    shots = int(point.split()[1])
                    lines.setdefault(method, []).append((shots, statistics.fmean(values)))
            name = f"few_shot_{target}.svg"
            plots.draw_lines(
                {m: sorted(v) for m, v in lines.items()},
                "shots",
                f"exact match, new {target}, %",
                output / name,
            )
        parts.append(_across(means))
        for title, ours, theirs in (
            ("Poly-S over Polytropon, few-shot", "poly_s", "polytropon"),
            ("Poly-S over shared LoRA, few-shot", "poly_s", "lora"),
            ("Polytropon over shared LoRA, few-shot", "polytropon", "lora"),
            (
                "Polytropon routed by task over by dataset, few-shot",
                "polytropon_by_task",
                "polytropon",
            ),
            ("FLix over shared LoRA, few-shot", "flix", "lora"),
            ("mu over Poly-S, few-shot", "mu", "poly_s"),
            ("z over Poly-S, few-shot", "z", "poly_s"),
        ):
            goals += _question(each, title, "new", {ours}, {theirs})
    each = by_seed(many)
    for title, ours, theirs in (
        ("AdaMix over LoRA, seen", "adamix_lora", "lora"),
        ("AdaMix over bottlenecks, seen", "adamix_adapter", "pfeiffer"),
        ("consistency over none, LoRA, seen", "adamix_lora", "adamix_lora_no_consistency"),
        (
            "consistency over none, bottlenecks, seen",
            "adamix_adapter",
            "adamix_adapter_no_consistency",
        ),
        ("FLix over bottlenecks against one bottleneck, seen", "flix_bottleneck", "pfeiffer"),
        ("FLix x AdaMix over FLix, seen", "flix_adamix", "flix"),
        ("Polytropon routed by task over by dataset, seen", "polytropon_by_task", "polytropon"),
    ):
        goals += _question(each, title, "seen", {ours}, {theirs})
    return "\n\n".join(parts), goals


def _across(means: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """Methods down, points across: the mean over seeds, with its standard error, and the least number of seeds."""
    points = plots.distinct(point for point, _ in means)
    lines = ["| | " + " | ".join(points) + " | seeds |", "|---" * (len(points) + 2) + "|"]
    for method in plots.distinct(method for _, method in means):
        values = [means.get((point, method), []) for point in points]
        shown = " | ".join(map(study.mean, values))
        lines.append(f"| {method} | {shown} | {min(map(len, values))} |")
    return "\n".join(lines)


def mtop6(output: pathlib.Path) -> Part:
    """Real parses by language, and whether what wins on the generated benchmark wins here."""
    store = study.Store(HERE / "mtop6" / "cells.jsonl")
    plan = mtop6_study.Plan(
        list(mtop6_study.SPLITS),
        list(mtop6_study.METHODS),
        seeds(store),
        store,
        Settings(pathlib.Path()),
    )
    rows = mtop6_study.rows(plan)
    if not rows:
        return "", []
    parts = ["## mtop6", "Parses by language; the ones in brackets were not trained."]
    for metric in mtop6_study.METRICS:
        of_metric = [row for row in rows if row["metric"] == metric]
        parts += [f"{metric.replace('_', ' ').capitalize()}:", _by_language(of_metric)]
    found = scores([row for row in rows if row["metric"] == "exact_match"])
    exact, structure = (
        by_seed([row for row in rows if row["metric"] == metric])
        for metric in ("exact_match", "structure_match")
    )
    plots.draw_bars(found, output / "mtop6.svg", ("seen", "unseen_pair"))
    goals: list[dict[str, Any]] = []
    ours, loras = "flix_shared_language_dropout", {"lora_4", "lora_16", "lora_64"}
    for title, setting, one, other in (
        ("mtop6: FLix over LoRA of the same compute, seen", "seen", "flix", {"lora_16"}),
        ("mtop6: ours over LoRA of the same compute, seen", "seen", ours, {"lora_16"}),
        ("mtop6: ours over FLix, held out", "unseen_pair", ours, {"flix"}),
        ("mtop6: ours over the best LoRA, held out", "unseen_pair", ours, loras),
    ):
        goals += _question(exact, title, setting, {one}, other)
        goals += _question(structure, f"{title}, structure", setting, {one}, other)
    return "\n\n".join(parts), goals


def _by_language(rows: Sequence[Row]) -> str:
    """A block for each point: methods down, languages across, then the means of trained and held out."""
    blocks = []
    for point in plots.distinct(row["point"] for row in rows):
        here = [row for row in rows if row["point"] == point]
        settings = {row["language"]: row["setting"] for row in here}
        order = sorted(settings, key=lambda language: (settings[language] != "seen", language))
        shown = [name if settings[name] == "seen" else f"({name})" for name in order]
        columns = [point, *shown, "trained", "held out", "seeds"]
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        means = scores(here)
        for method in plots.distinct(row["method"] for row in here):
            mine = [row for row in here if row["method"] == method]
            values = [[row["value"] for row in mine if row["language"] == name] for name in order]
            values += [means[point, method, setting] for setting in ("seen", "unseen_pair")]
            count = len(values[0])
            lines.append(f"| {method} | " + " | ".join(map(study.mean, values)) + f" | {count} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


PARTS: Mapping[str, Callable[[pathlib.Path], Part]] = {
    "zero_shot": zero_shot,
    "family": family,
    "mtop6": mtop6,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=HERE.parent / "docs" / "studies", type=pathlib.Path)
    args = parser.parse_args(argv)
    texts = [
        "# Tables of the studies",
        "Made by `python -m benchmarks.report`: exact match in percent, mean and standard error over seeds.",
    ]
    goals: list[dict[str, Any]] = []
    for name, part in PARTS.items():
        text, found = part(args.output)
        if not text:
            print(f"{name} has no results yet")
            continue
        texts.append(text)
        goals += found
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "tables.md").write_text("\n\n".join(texts) + "\n")
    print(f"wrote {args.output / 'tables.md'}")
    print(json.dumps({"goals": goals}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
