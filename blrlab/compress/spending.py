"""How a budget is spent on options: each unit of cost where it saves the most loss.

Only options on the lower convex hull of a layer's loss over cost are worth their cost. All layers start at their
cheapest, and the steepest step that still fits is taken until none does (marginal analysis; Fox, 1966). What is left
over buys any option that fits.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import BLOCKED, Spec


@dataclasses.dataclass(frozen=True)
class Option:
    """A spec of one layer: its cost in the target's unit, and the share of the layer's energy that it loses."""

    spec: Spec
    cost: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What every layer is to become, and what that is expected to lose.

    Attributes:
      specs: {path: spec}, in the model's order; what `compress` takes.
      lost: {path: the share of its energy}.
      total: the weighted sum of the losses.
      cost: of the layers, in the target's unit (parameters, bytes or us).
      budget: what they might have cost.
      uniform: {name: its total} of the baselines that give every layer the same share of its dense cost.
    """

    specs: dict[str, Spec]
    lost: dict[str, float]
    total: float
    cost: float
    budget: float
    uniform: dict[str, float]


def choose(options: Mapping[str, Sequence[Option]], budget: float, weights: Mapping[str, float]) -> Allocation:
    """Choose one option a layer so that the weighted loss is small and the cost within the budget.

    Raises:
      InputError: the cheapest options cost more.
    """
    cheapest = sum(min(each.cost for each in found) for found in options.values())
    if cheapest > budget:
        raise InputError(f"the layers cost {cheapest:,.0f} at the least, and the budget leaves {budget:,.0f} for them.")
    plans = {"": _spent(options, budget, weights)} | uniform(options, budget)

    def total(plan: Mapping[str, Option]) -> float:
        return sum(weights[path] * option.lost for path, option in plan.items())

    best = min(plans.values(), key=total)  # the first of equals: steps of many sizes may leave a little unspent
    return Allocation(
        specs={path: option.spec for path, option in best.items()},
        lost={path: option.lost for path, option in best.items()},
        total=total(best),
        cost=sum(option.cost for option in best.values()),
        budget=budget,
        uniform={name: total(plan) for name, plan in plans.items() if name},
    )


def uniform(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, dict[str, Option]]:
    """Return the baselines, {name: {path: option}}: one format and b, each layer at most the same share of its size."""
    kinds = dict.fromkeys(
        (each.spec.format, each.spec.blocks) for found in options.values() for each in found if each.spec.rank
    )
    plans = {}
    for format, blocks in kinds:
        alike = {
            path: sorted(
                (each for each in found if (each.spec.format, each.spec.blocks) == (format, blocks)), key=_share
            )
            for path, found in options.items()
        }
        shares = {path: [_share(each) for each in found] for path, found in alike.items()}
        least = max((found[0] if found else math.inf) for found in shares.values())
        for share in sorted({share for found in shares.values() for share in found}, reverse=True):
            if share < least:
                break
            plan = {path: found[bisect.bisect_right(shares[path], share) - 1] for path, found in alike.items()}
            if sum(each.cost for each in plan.values()) <= budget:
                plans[f"{format} {blocks[0]}" if format in BLOCKED else format] = plan
                break
    return plans


def _spent(options: Mapping[str, Sequence[Option]], budget: float, weights: Mapping[str, float]) -> dict[str, Option]:
    """Spend a budget step by step, the steepest first."""
    hulls = {path: _hull(found) for path, found in options.items()}
    at = dict.fromkeys(options, 0)
    left = budget - sum(hull[0].cost for hull in hulls.values())
    steps: list[tuple[float, int, str]] = []  # the next of every layer, the steepest on top

    def offer(number: int, path: str) -> None:
        hull, place = hulls[path], at[path]
        if place + 1 < len(hull):
            heapq.heappush(steps, (-weights[path] * _slope(hull[place], hull[place + 1]), number, path))

    for number, path in enumerate(hulls):
        offer(number, path)
    while steps:
        _, number, path = heapq.heappop(steps)
        rise = hulls[path][at[path] + 1].cost - hulls[path][at[path]].cost
        if rise <= left:  # what does not fit will not later
            left -= rise
            at[path] += 1
            offer(number, path)
    chosen = {path: hull[at[path]] for path, hull in hulls.items()}
    return _topped_up(options, chosen, left, weights)


def _topped_up(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: float, weights: Mapping[str, float]
) -> dict[str, Option]:
    """Buy with what is left over, the greatest gain first, options that need not be on a hull."""
    while True:
        gains = [
            (weights[path] * (now.lost - each.lost), path, each)
            for path, now in chosen.items()
            for each in options[path]
            if each.cost <= now.cost + left and each.lost < now.lost and weights[path] > 0
        ]
        if not gains:
            return chosen
        _, path, option = max(gains, key=lambda gain: gain[0])
        left -= option.cost - chosen[path].cost
        chosen = {**chosen, path: option}


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of the loss over the cost, at rising cost and falling loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.cost, each.lost)):
        if hull and option.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(left: Option, right: Option) -> float:
    """Return the loss saved per cost."""
    return (left.lost - right.lost) / (right.cost - left.cost)


def _share(option: Option) -> float:
    spec = option.spec
    return factors.parameter_count(spec) / (spec.in_features * spec.out_features)
