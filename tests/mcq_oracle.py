"""Rows for the tests of the metric, and all its outputs by the loops of the reference."""

import math

import numpy as np

from hf_ext.mcq_bias import reference
from hf_ext.mcq_bias.reference import NAN, Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def rows_of(predictions, references, num_choices=None, group=None, permutation=None):
    """Plain lists: scores of exactly k choices or indices, num_choices one a row."""
    n = len(references)
    has_scores = n > 0 and isinstance(predictions[0], list)
    k = [len(row) for row in predictions] if num_choices is None else num_choices
    return [
        Row(
            k=k[i],
            r=references[i],
            scores=predictions[i] if has_scores else None,
            answer=-1 if has_scores else predictions[i],
            group=str(group[i] or "") if group else "",
            permutation=permutation[i] if permutation else None,
        )
        for i in range(n)
    ]


def share(hits, n):
    return hits / n if n else NAN


def by_loops(rows, anchor=0, confidence=0.95):
    """Every output but those of the bootstrap and n_choices_inferred."""
    n, letters = len(rows), max((row.k for row in rows), default=0)
    valid = [row for row in rows if row.valid]
    eligible = [row for row in rows if anchor < row.k and row.r != anchor]
    on_anchor = sum(row.w[anchor] for row in eligible)
    chosen = [sum(row.w[j] for row in valid if j < row.k) for j in range(letters)]
    gold = [sum(row.r == j for row in valid) for j in range(letters)]
    recall = reference.recalls(rows)
    p, q = ([(x + 0.5) / (len(valid) + letters / 2) for x in counts] for counts in (chosen, gold))
    found = {
        "n": n,
        "n_invalid": n - len(valid),
        "n_ties": sum(sum(mass > 0 for mass in row.w) > 1 for row in rows),
        "n_anchor_eligible": len(eligible),
        "accuracy": share(sum(row.c for row in rows), n),
        "anchored_bias_rate": share(on_anchor, len(eligible)),
        "tvd": share(sum(abs(x - y) for x, y in zip(chosen, gold, strict=True)) / 2, len(valid)),
        "kl": sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) if valid else NAN,
        "recall_std": reference.recall_std(rows),
        "recall_std_null": reference.recall_std_null(rows),
        "calibrated_accuracy": NAN,
        "calibrated_anchored_bias_rate": NAN,
    }
    for name, hits, size in (
        ("accuracy", sum(row.c for row in rows), n),
        ("anchored_bias_rate", on_anchor, len(eligible)),
    ):
        found[f"{name}_low"], found[f"{name}_high"] = reference.wilson(hits, size, confidence)
    errors = reference.anchored_errors(rows, anchor)
    cmh = reference.cochran_mantel_haenszel(rows, anchor)
    found |= zip(("anchored_error_share", "anchored_error_share_expected", "anchored_error_z"), errors, strict=True)
    found |= zip(("cmh_z", "cmh_statistic", "cmh_p_value"), cmh, strict=True)
    for j in range(letters):
        found[f"choice_share_{LETTERS[j]}"] = share(chosen[j], len(valid))
        found[f"gold_share_{LETTERS[j]}"] = share(gold[j], len(valid))
        found[f"recall_{LETTERS[j]}"] = recall.get(j, NAN)
    if rows and all(row.scores is not None for row in rows):
        masses = reference.calibrated(rows)
        found["calibrated_accuracy"] = np.mean([mass[row.r] for mass, row in zip(masses, rows, strict=True)])
        there = [mass[anchor] for mass, row in zip(masses, rows, strict=True) if anchor < row.k and row.r != anchor]
        found["calibrated_anchored_bias_rate"] = np.mean(there) if there else NAN
    return found | groups_by_loops(rows)


def groups_by_loops(rows):
    groups = reference.by_group(rows)
    complete = [group for group in groups if reference.is_complete(group)]
    agreement = np.mean([reference.consistency(group) for group in groups]) if groups else NAN
    n_pride, pride = reference.pride(rows, complete)
    return {
        "n_groups": len(groups),
        "permutation_consistency": agreement,
        "flip_rate": 1 - agreement,
        "n_complete_groups": len(complete),
        "cyclic_accuracy": reference.cyclic_accuracy(complete),
        "n_pride": n_pride,
        "pride_accuracy": pride,
    }


def differences(found, expected, tolerance=1e-9):
    """Names of what differs; NaN equals NaN."""
    return {
        name: (found.get(name), value)
        for name, value in expected.items()
        if name not in found
        or not (
            abs(found[name] - value) <= tolerance * max(1, abs(value))
            or (math.isnan(found[name]) and math.isnan(value))
        )
    }


# --- rows by chance


def draw_answers(n, ks=(2, 3, 4, 5), seed=0, skew=0.0, bias=0.0, invalid=0.0):
    """Indices: right half of the time, "A" a share `bias` of the time, gold "A" a share `skew` more often."""
    draw = np.random.default_rng(seed)
    k = draw.choice(ks, n)
    gold = np.where(draw.random(n) < skew, 0, draw.integers(0, k))
    answer = np.where(draw.random(n) < 0.5, gold, draw.integers(0, k))
    answer = np.where(draw.random(n) < bias, 0, answer)
    answer = np.where(draw.random(n) < invalid, draw.choice([-1, 30], n), answer)
    return {"predictions": answer.tolist(), "references": gold.tolist(), "num_choices": k.tolist()}


def draw_scores(n, ks=(2, 3, 4, 5), seed=0, levels=4, damaged=0.1):
    """Score rows of a few levels, so that they tie; some hold NaN, inf or -inf."""
    draw = np.random.default_rng(seed)
    k = draw.choice(ks, n).tolist()
    scores = [(draw.integers(0, levels, size) / 2 - 3.0).tolist() for size in k]
    for row in scores:
        if draw.random() < damaged:
            row[draw.integers(len(row))] = draw.choice([np.nan, np.inf, -np.inf]).item()
    if n > 3 and damaged:
        scores[1] = [-np.inf] * k[1]
    return {"predictions": scores, "references": [int(draw.integers(size)) for size in k]}


def draw_groups(n_groups, seed=0, explicit=False, ks=(2, 3, 4), loss=0.2):
    """Questions in all rotations, or with `explicit` in as many orders of any kind; some rows are lost."""
    draw = np.random.default_rng(seed)
    rows = {"predictions": [], "references": [], "group": [], "permutation": []}
    for number in range(n_groups):
        k = int(draw.choice(ks))
        value, taste = draw.normal(size=k), np.append(1.0, np.zeros(k - 1))
        gold = int(draw.integers(k)) if explicit else 0
        start = draw.permutation(k) if explicit else np.arange(k)
        for turn in range(k):
            order = np.roll(start, turn)
            if draw.random() < loss / k:
                continue
            rows["predictions"].append((value[order] + taste + 0.3 * draw.normal(size=k)).round(1).tolist())
            rows["references"].append(int(np.flatnonzero(order == gold)[0]))
            rows["group"].append(f"q{number}")
            rows["permutation"].append(order.tolist())
    return rows if explicit else {name: rows[name] for name in ("predictions", "references", "group")}
