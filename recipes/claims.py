"""The claims ledger, docs/claims.md: each claim of the paper, what was found, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from judges import (
    Judge,
    best_of,
    differ,
    efficient,
    explained,
    gain,
    group_counts,
    grows,
    lambdas,
    measured,
    nearer,
    new_domains,
    none,
    spoiled,
    structure,
    theory,
    too_high,
    too_low,
    unstable,
)
from layouts import CIFAR100, CORRELATION, DCI, GROUPS, SPARSE, TASKS
from rules import FEW_ARMS, FEW_SEEDS, PART, RANK, VERDICTS, combine
from study import Study

from sparsejepa.study.verdict import ENOUGH_SEEDS


@dataclass(frozen=True)
class Claim:
    """A claim in our words. `table` is where its numbers stand, 0 for another page."""

    section: str
    text: str
    judge: Judge
    table: int = 0
    scales: Sequence[str] = ("small", "full")
    """Where it is judged; "any" for what has no scale."""


FLOORS = ("untrained", "PCA", "k-means", "places")
NUMBERS = {measure.title: (measure, paper) for measure, paper in TASKS if paper}
TRAINED = "dense|lam=0.*|density=0.*"
ACCURACIES = (
    ("CIFAR-100", "CIFAR-100"),
    ("Places205", "MiniPlaces, 100 scenes at 32x32, for Places205"),
    ("CLEVR/Count", "CLEVR/Count, generated scenes"),
    ("iNaturalist 2018", "iNaturalist 2018"),
)
CLAIMS = (
    *(
        Claim(
            "Accuracy of the linear probe",
            f"{name}: {NUMBERS[title][1][0]:.2f} % for JEPA, {NUMBERS[title][1][1]:.2f} % with "
            "the sparsity penalty",
            gain(*NUMBERS[title]), 1,
        )
        for name, title in ACCURACIES
    ),
    Claim(
        "The two propositions", "Grouping lowers multi-information, strictly so where groups "
        "depend on each other",
        theory(
            PART, "TC(X) = TC(G) + the dependence inside the groups, so TC(G) <= TC(X); strict "
            "where a group depends inside, never by dependence across groups.",
            "test_chain_rule_for_tables", "test_chain_rule_for_gaussians",
            "test_strict_exactly_where_a_group_depends_inside",
            "test_dependence_across_groups_alone_never_makes_it_strict",
        ), scales=("any",),
    ),
    Claim(
        "The two propositions", "Groups tell at least as much about a variable as the latents",
        theory(
            PART, "An equality for a partition, which only renames the latents; a map of the "
            "latents, as W is, can lose and never gains.",
            "test_a_partition_is_a_relabelling_and_keeps_the_information",
            "test_a_lossy_map_never_adds_information", "test_where_a_lossy_map_loses_and_where_not",
        ), scales=("any",),
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "Patches of one object share groups more often than patches of two",
        explained("same group, gap", ("shuffled", "untrained", "PCA")),
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "Assumption: patches of one object share more information than patches of two",
        explained("I(patch; patch), gap", ()),
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "It breaks without semantic structure: pretrained on noise, transfer falls",
        spoiled("noise", TRAINED, CIFAR100, -1), 9,
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "The same for images whose patches are shuffled",
        spoiled("shuffle", TRAINED, CIFAR100, -1), 9,
    ),
    Claim(
        "Mechanism 1: related features share latents",
        "Nor do groups appear in noise: the same lambda leaves more groups per latent",
        spoiled("noise", "lam=0.*", GROUPS, 1), 9,
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "The latents' total correlation is lower than without penalty and than in dense",
        differ(3, (SPARSE, "lam=0"), (SPARSE, "dense"), measure=CORRELATION, sign=-1), 3,
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "Assumption: what groups share comes from latents that they have in common",
        theory(
            PART, "True of independent latents; disjoint groups of correlated latents still share.",
            "test_overlap_of_two_groups", "test_disjoint_groups_of_correlated_latents_still_share",
        ), scales=("any",),
    ),
    Claim(
        "Mechanism 2: sparse groups lower multi-information",
        "It is the learned pattern of zeros that counts, not zeros of any kind",
        differ(2, (SPARSE, f"{SPARSE}+pattern=random")), 2,
    ),
    Claim(
        "Mechanism 3: prediction of embeddings, not pixels",
        "Predicting embeddings reads better in a linear probe than predicting pixels",
        differ(10, *((arm, f"{arm}+predict=pixels") for arm in ("dense", SPARSE))), 10,
    ),
    Claim(
        "Mechanism 3: prediction of embeddings, not pixels",
        "Assumption: the backbone is large and trained enough; the gain grows with both", grows, 5,
    ),
    Claim("Trade-offs", "The number of groups G matters for accuracy", group_counts, 6),
    Claim("Trade-offs", "More lambda leaves fewer groups per latent", structure, 3),
    Claim("Trade-offs", "Some lambda between none and too much gains accuracy", best_of(3), 3),
    Claim(
        "Interpretability", "The latents are better disentangled (DCI) than without penalty",
        differ(3, (SPARSE, "lam=0"), (SPARSE, "dense"), measure=DCI), 3,
    ),
    Claim(
        "Interpretability", "As units of code, groups match single factors (MIG)",
        explained("MIG", FLOORS, "Disentanglement, groups"),
    ),
    Claim(
        "Efficiency", "Half of the groups suffice: no loss, and better than as many random latents",
        efficient, 11,
    ),
    Claim(
        "Failure signatures", "The largest lambda is too high: below dense, all "
        "latents in one group",
        too_high, 3,
    ),
    Claim("Failure signatures", "Lambda too low: nothing changes", too_low, 3),
    Claim(
        "Failure signatures", "Training is unstable where the EMA does not suit the term",
        unstable, 6,
    ),
    Claim(
        "Failure signatures", "Probes fail on new domains: no better than untrained",
        new_domains, 7,
    ),
    Claim(
        "Suggested experiments",
        "Lambda on 5,000 images: sparser with lambda, and a gain somewhere",
        lambdas, 3, ("small",),
    ),
    Claim(
        "Suggested experiments", "What activates a group: its activations tell an object's colour, "
        "more than by chance and without training",
        explained("I(group; colour)", ("shuffled", "untrained")),
    ),
    Claim("Suggested experiments", "Near and far: the gain is larger near", nearer, 7),
    Claim("Open questions", "Do groups follow objects? (FG-ARI)", explained("FG-ARI", FLOORS)),
    Claim(
        "Open questions", "Do the gains hold for ViT-B and ViT-L on ImageNet?",
        none("ImageNet was not at hand; ViT-Base on CIFAR-100 is in table 5"), 5, ("any",),
    ),
    Claim(
        "Open questions", "Can interpretability be measured apart from accuracy?",
        measured, 3,
    ),
)  # fmt: skip


def ledger(study: Study) -> tuple[str, dict[str, dict[str, int]]]:
    """Return docs/claims.md and the number of each verdict by scale."""
    counts: dict[str, dict[str, int]] = {}
    parts = [ABOUT, *filter(None, [study.left_out])]
    for section in dict.fromkeys(claim.section for claim in CLAIMS):
        lines = [f"## {section}", "", "| claim | scale | verdict | evidence |", "|---|---|---|---|"]
        for claim in (c for c in CLAIMS if c.section == section):
            shown = claim.text
            for where in claim.scales:
                signs = claim.judge(study, where == "full")
                verdict = combine(signs)
                tally = counts.setdefault(where, dict.fromkeys(VERDICTS, 0))
                tally[verdict] += 1
                evidence = "<br>".join(sign.text for sign in signs) or "no run planned"
                link = f" ([table {claim.table}](results.md#table-{claim.table}))"
                evidence += link if claim.table and signs else ""
                lines.append(f"| {shown} | {where} | **{verdict}** | {evidence} |")
                shown = ""
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n", counts


ABOUT = f"""# The paper's claims

Made by `python recipes/tables.py` from `results/`; the numbers are those of
[results.md](results.md), which says what the intervals mean. Each claim of the SparseJEPA paper
(arXiv 2504.16140), in our words, is judged at two scales: *small* is what two CPU cores allow
(5,000 images, small encoders), *full* the paper's (all of CIFAR-100, ViT-Tiny, on a GPU). What is
missing at the small scale says nothing of the paper's numbers: that is the other line.

How a verdict comes about, by rule and not by hand:

- A claim says that a difference has a sign. **Holds**: the 95 % interval lies on that side of 0,
  with at least {ENOUGH_SEEDS} paired seeds. **Holds in part**: the same with fewer seeds, or shown
  for some of the differences while the others are open. **Does not hold**: the interval lies on
  the other side, or includes 0 with {ENOUGH_SEEDS} seeds or more, so that no difference is shown
  at this scale. **Not tested**: nothing was run, or an interval of fewer seeds includes 0 and
  decides nothing.
- A claim that needs several things needs all of them: where one does not hold, it does not hold.
- "No loss" and "nothing changes" are shown by an interval, not by the want of a difference: all of
  it must lie above -1 point ("no loss") or within 1 point of 0 ("nothing changes").
- The sparse arm of a pair is `{SPARSE}`, fixed before any run; where the best of several is
  taken, it is one of those with the most seeds and the interval is widened for the choice
  (Bonferroni). A gain must show against dense, the paper's own comparison, and against `lam=0`,
  without which it is not the penalty's: while that difference is open, the claim is not tested,
  whatever is shown against dense. Where the dense arm does not beat an untrained encoder
  nothing is judged.
- "No better than untrained": a clear gain refutes it, a clear loss shows it, and no difference
  over {ENOUGH_SEEDS} seeds shows it in part.
- Instability counts for a penalised run that fails or raises the alarm where `lam=0` with the same
  EMA and seed does not; in fewer than {ENOUGH_SEEDS} seeds it is shown in part.
- DCI and accuracy are apart when the interval of their rank correlation over the arms
  (at least {FEW_ARMS}, of {FEW_SEEDS} seeds) lies within ±{RANK}; from ±{RANK} on they are not.
- Measures of explained runs (`results/explain.jsonl`, [explain.md](explain.md)) are judged by
  whether their interval clears those of all floors (holds), of some (in part), or lies below one
  (does not hold); without a floor they hold in part at most. These intervals resample images and
  know nothing of other seeds.
- Propositions are judged by tests; [theory.md](theory.md) has the argument. Without the test
  there is no verdict.

What was measured with version 1 is a verdict on random connections, not on learned ones
([results.md](results.md) says why)."""
