"""How far a run is: stages done and running, and the time left by the cost model, in this machine's own seconds."""

from roads.config import Params
from roads.runner import cost
from roads.runner.devices import DEVICES, cpu_for
from roads.schema import Compute


def weights(commands: dict[str, str | list[str]], params: Params, compute: Compute) -> dict[str, float]:
    """What each stage is expected to take, in seconds of some CPU or GPU: only their ratios count. A stage that the
    model does not know takes as long as the others do on average."""
    blocks, drawn, found = {name: block.model_dump() for name, block in params.blocks.items()}, set(), {}
    device = DEVICES["H100" if compute.device == "gpu" else cpu_for(compute.precision)]
    for name, command in commands.items():
        done = cost.work(command, blocks, drawn)
        found[name] = done.seconds(device) if done else None
    known = [seconds for seconds in found.values() if seconds]
    usual = sum(known) / len(known) if known else 1.0
    return {name: seconds or usual for name, seconds in found.items()}


class Progress:
    """Of a run of several stages at once. What was done says how much slower or faster than modelled this machine is.

    >>> run = Progress({"a": 10.0, "b": 10.0, "c": 20.0}, jobs=2)
    >>> run.done("a", 30.0)
    >>> run.line(running=1)  # c alone takes 20 modelled seconds, and one of them is three real ones
    '1 of 3, 1 running; about 60 s left'
    """

    def __init__(self, weights: dict[str, float], jobs: int):
        self.left, self.jobs, self.total = dict(weights), jobs, len(weights)
        self.modelled = self.measured = 0.0

    def done(self, stage: str, seconds: float) -> None:
        self.modelled += self.left.pop(stage)
        self.measured += seconds

    def line(self, running: int) -> str:
        """As much as can be said: no time before the first stage is done, nor when all are."""
        text = f"{self.total - len(self.left)} of {self.total}" + f", {running} running" * (running > 0)
        if not self.left or not self.modelled:
            return text
        most = max(self.left.values())  # none of them is split over two workers
        left = self.measured / self.modelled * max(sum(self.left.values()) / self.jobs, most)
        return f"{text}; about {clock(left)} left"


def clock(seconds: float) -> str:
    """A time as people say it.

    >>> [clock(seconds) for seconds in (45, 200, 5400)]
    ['45 s', '3 min', '1 h 30 min']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
