"""Training in one process against two, as a part of the figures of scale."""

from experiments.load_checks import Part, at_most
from experiments.scaling_processes import measure_processes
from experiments.scaling_results import ScalingConfig, figure

_PROCESSES = 2
_ROUNDS = 3
_MOST_DIFFERENCE = 1e-4  # sums of floats in another order, over an epoch of steps


def measure(config: ScalingConfig) -> Part:
    """Train on a few weeks in one process and in two, one thread a process."""
    found = measure_processes(
        config.data, config.output / "processes", processes=_PROCESSES, rounds=_ROUNDS
    )
    checks = [
        figure(f"{name}: rows/s", contestant["rows_per_second"])
        for name, contestant in found["contestants"].items()
    ]
    checks += [
        figure(f"{_PROCESSES} processes: efficiency", found["efficiency"]),
        at_most("greatest difference of a metric", found["greatest_difference"], _MOST_DIFFERENCE),
    ]
    return Part(checks=tuple(checks), figures=found)
