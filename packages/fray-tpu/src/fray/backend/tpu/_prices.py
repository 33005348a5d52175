"""What slices cost: a dated table of Google's list prices, and nothing that is not in it.

A price that is not known is said not to be, with the reason. Discounts, credits and what else a project runs (disks,
addresses, traffic) are not counted. Google bills a TPU VM from READY on; a queued request costs nothing.

On-demand prices are US dollars for one chip and hour. They are those of Google's billing catalogue ("Cloud TPU",
service E000-3F24-B8AA, which https://cloud.google.com/tpu/pricing shows too), read from the copy that SkyPilot keeps of
it: github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv at 006059e0, without the rows that its maintainers
fill in by assumption (docs/tpu-slices.md says how to bring the table up to date).
"""

from __future__ import annotations

from dataclasses import dataclass

from fray.backend.tpu.types import Tier
from fray.tpu import TpuType, tpu_type

__all__ = ["AS_OF", "SOURCE", "Cost", "cost_per_hour", "cost_so_far", "dollars"]

AS_OF = "2026-11-25"
SOURCE = "https://cloud.google.com/tpu/pricing"

_US = ("us-central1", "us-east1", "us-east4", "us-east5", "us-west1", "us-west4")


def _regions(**prices: float) -> dict[str, float]:
    return {region.replace("_", "-"): price for region, price in prices.items()}


# v2 and v3 cost one thing as a single device and another as part of a pod.
_ON_DEMAND: dict[str, dict[str, float]] = {
    "v2": _regions(us_central1=1.125, europe_west4=1.2375, asia_east1=1.305),
    "v2 pod": _regions(us_central1=1.5, europe_west4=1.5),
    "v3": _regions(us_central1=2.0, europe_west4=2.2),
    "v3 pod": _regions(europe_west4=2.0),
    "v4": _regions(us_central2=3.22),
    "v5e": dict.fromkeys(_US, 1.2)
    | _regions(
        us_south1=1.416,
        northamerica_northeast1=1.32132,
        southamerica_west1=1.716,
        europe_north1=1.32132,
        europe_west1=1.32132,
        europe_west3=1.416,
        europe_west4=1.56,
        asia_east1=1.38948,
        asia_northeast1=1.54104,
        asia_southeast1=1.56,
    ),
    "v5p": dict.fromkeys(("us-central1", "us-east1", "us-east5"), 4.2)
    | _regions(us_south1=4.779, europe_west1=4.459455, europe_west4=4.2525),
    "v6e": dict.fromkeys(("us-central1", "us-east1", "us-east4", "us-east5", "us-west1"), 2.7)
    | _regions(
        us_south1=2.7,
        southamerica_west1=2.7,
        europe_west4=2.97,
        asia_northeast1=3.24,
        asia_south1=3.24,
        asia_southeast1=2.97,
    ),
}


@dataclass(frozen=True)
class Cost:
    """An amount of US dollars, or why it is not known.

    Attributes:
        dollars: None where it is not known.
        note: Where the amount comes from, or why there is none.
    """

    dollars: float | None
    note: str

    def __str__(self) -> str:
        return "unknown" if self.dollars is None else dollars(self.dollars)


def cost_per_hour(accelerator_type: str, zone: str, tier: Tier | None = Tier.ON_DEMAND, num_slices: int = 1) -> Cost:
    """Return what slices cost for each hour that they are READY.

    Args:
        accelerator_type: Such as `v5litepod-16`.
        zone: Such as `us-central1-a`; a region will do.
        tier: How they are paid for.
        num_slices: How many there are.

    Raises:
        InvalidValueError: There is no such type.
    """
    kind = tpu_type(accelerator_type)
    region = _region(zone)
    listed = _ON_DEMAND.get(_row(kind), {}).get(region)
    if tier is Tier.ON_DEMAND:
        if listed is None:
            return Cost(None, f"no list price of {kind.generation} in {region} is known here; see {SOURCE}")
        amount = listed * kind.chips * num_slices
        return Cost(amount, f"{_exact(listed)} a chip and hour in {region}, Google's list price as of {AS_OF}")
    if tier is Tier.SPOT:
        why = "spot prices change from day to day"
    elif tier is Tier.RESERVED:
        why = "a reservation's price is what its contract says"
    else:
        return Cost(None, "nothing says whether it is spot, on demand or reserved")
    if listed is not None:
        why += f"; on demand it would be {dollars(listed * kind.chips * num_slices)} an hour"
    return Cost(None, f"{why}; see {SOURCE}")


def cost_so_far(per_hour: Cost, seconds: float) -> Cost:
    """Return what was spent in a time, at a known price."""
    if per_hour.dollars is None:
        return per_hour
    return Cost(per_hour.dollars * max(0.0, seconds) / 3600, per_hour.note)


def dollars(amount: float) -> str:
    """Return an amount as a person reads it: to the cent, or to two digits below one."""
    return f"${amount:.2g}" if 0 < amount < 0.01 else f"${amount:,.2f}"


def _exact(price: float) -> str:
    """Return a price with all its digits, two behind the point at least."""
    whole, _, rest = f"{price:.6f}".rstrip("0").partition(".")
    return f"${whole}.{rest:0<2}"


def _row(kind: TpuType) -> str:
    is_pod = kind.generation in ("v2", "v3") and kind.hosts > 1
    return f"{kind.generation} pod" if is_pod else kind.generation


def _region(zone: str) -> str:
    """Return the region of a zone: `us-central1` of `us-central1-a`."""
    parts = zone.split("-")
    return "-".join(parts[:2]) if len(parts) > 2 else zone
