#!/usr/bin/env python3
"""collect.py FOLDER OUT: runs of run.sh as OUT.json, one table on standard output, and OUT.svg. Groups of an earlier
OUT.json of which FOLDER has no run stay.

Accuracies are shares of 1,002 held-out tasks of a type; the intervals of differences come from seeds where there are
several (Student's t), else from both shares (Wald)."""
import json
import math
import pathlib
import re
import sys

TYPES = ["abduction", "deduction", "induction"]
TASKS = 1002
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
COLOURS = {"abduction": "#1b6ca8", "deduction": "#c8553d", "induction": "#3a7d44"}


def shares(scores):
    """By type, of names like grammar/abduction or grammar."""
    return {t: scores[f"grammar/{t}"] for t in TYPES}


def read(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [m for m in lines if "configs" in m]
    name, seed = re.fullmatch(r"(.*)-(\d+)", folder.name).groups()
    cpu = pathlib.Path(f"{folder}.cpu")
    settings = re.findall(r"^(\S+ = \S+)  # (?:--set|--preset|--steps)", (folder / "resolved.toml").read_text(), re.M)
    run = {
        "name": name,
        "seed": int(seed),
        "settings": settings,
        "steps": steps[-1]["step"],
        "cpu_s": round(sum(map(float, cpu.read_text().split()))) if cpu.exists() else None,
        "step_s": round(sum(m["step_s"] for m in steps), 1),
        "accuracy": {m["step"]: shares(m["eval"]) for m in lines if m.get("eval")},
        "greedy": {},
        "curve": [],
    }
    for scores in sorted(folder.glob("greedy-*")):
        found = json.loads((scores / "results.json").read_text())["results"]
        run["greedy"][int(scores.name[7:])] = {t: found[f"grammar/{t}"]["exact_match,none"] for t in TYPES}
    for start in range(0, len(steps), 20):
        part = steps[start : start + 20]
        mean = lambda value: round(sum(map(value, part)) / len(part), 4)
        # Of the types that have a valid proposal; a step without any counts as varied.
        valid = lambda m: [v for v in m["variety"].values() if v["num_valid"]]
        variety = lambda m, key: sum(v[key] for v in valid(m)) / len(valid(m)) if valid(m) else 1.0
        run["curve"].append({
            "step": part[-1]["step"],
            "valid": mean(lambda m: m["valid"]),
            "unique_programs": mean(lambda m: variety(m, "unique_programs")),
            "unique_answers": mean(lambda m: variety(m, "unique_answers")),
            "entropy": mean(lambda m: sum(c["entropy"] for c in m["configs"].values()) / len(m["configs"])),
            "reward": mean(lambda m: m["reward"]),
        })
    return run


def difference(runs, key, kind):
    """Mean gain from first to last in points, with half the width of its 95 % interval."""
    gains = [100 * (r[key][max(r[key])][kind] - r[key][min(r[key])][kind]) for r in runs if len(r[key]) > 1]
    if not gains:
        return None
    mean = sum(gains) / len(gains)
    if len(gains) > 1:
        spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
        return mean, T95.get(len(gains), 2.0) * spread
    first, last = (runs[0][key][pick(runs[0][key])][kind] for pick in (min, max))
    return mean, 196 * math.sqrt((first * (1 - first) + last * (1 - last)) / TASKS)


def table(groups):
    print("| run | seeds | steps | CPU s | " + " | ".join(f"{t}, T = 1 | {t}, greedy" for t in TYPES) + " |")
    print("|---" * (4 + 2 * len(TYPES)) + "|")
    for name, runs in groups.items():
        cells = [name, str(len(runs)), "/".join(str(r["steps"]) for r in runs), "/".join(str(r["cpu_s"]) for r in runs)]
        for kind in TYPES:
            for key in ("accuracy", "greedy"):
                gain = difference(runs, key, kind)
                cells.append("" if gain is None else f"{gain[0]:+.1f} +- {gain[1]:.1f}")
        print("| " + " | ".join(cells) + " |")


def svg(groups, path):
    """One panel a group: held-out accuracy at temperature 1 over steps, a line a seed."""
    wide, high, left, top = 300, 210, 44, 34
    panels = []
    for i, (name, runs) in enumerate(groups.items()):
        last = max(r["steps"] for r in runs)
        x = lambda step: left + (wide - left - 12) * step / last
        y = lambda share: top + (high - top - 34) * (1 - (share - 0.2) / 0.6)
        parts = [f'<text x="{left}" y="18" font-weight="bold">{name}</text>']
        for share in (0.2, 0.4, 0.6, 0.8):
            parts.append(f'<path d="M{left} {y(share):.1f}H{wide - 12}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        for step in (0, last):
            parts.append(f'<text x="{x(step):.1f}" y="{high - 16}" text-anchor="middle">{step}</text>')
        for run in runs:
            for kind in TYPES:
                points = " ".join(f"{x(s):.1f},{y(a[kind]):.1f}" for s, a in run["accuracy"].items())
                parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[kind]}" stroke-width="1.5"/>')
        panels.append(f'<g transform="translate({i % 3 * wide} {i // 3 * high})">{"".join(parts)}</g>')
    rows = -(-len(groups) // 3) * high
    key = "".join(
        f'<text x="{left + 110 * i}" y="{rows + 16}" fill="{COLOURS[t]}">{t}</text>' for i, t in enumerate(TYPES)
    )
    width = wide * min(3, len(groups))
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {rows + 26}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}{key}'
        f'<text x="{width - 12}" y="{rows + 16}" text-anchor="end">held-out accuracy at temperature 1, by step</text></svg>\n'
    )


def main():
    folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    earlier = out.with_suffix(".json")
    groups, found = json.loads(earlier.read_text()) if earlier.exists() else {}, {}
    for run in map(read, sorted(p for p in folder.iterdir() if (p / "metrics.jsonl").exists())):
        found.setdefault(run["name"], []).append(run)
    groups = dict(sorted({**groups, **found}.items(), key=lambda g: (g[0] != "preset", g[0])))
    # Steps are numbers here and text in JSON.
    for run in (run for runs in groups.values() for run in runs):
        for key in ("accuracy", "greedy"):
            run[key] = {int(step): scores for step, scores in run[key].items()}
    out.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n")
    svg(groups, out.with_suffix(".svg"))
    table(groups)


main()
