"""A GPU that is not there: kernels are compiled for it and everything is done but the launch."""

from functools import partial

from normc.backends import triton
from normc.backends.gpus import MACHINES
from normc.backends.settle import Maker


class Silent:
    """A compiled kernel whose launcher does nothing, and keeps count."""

    function, packed_metadata = 0, ()

    def __init__(self):
        self.calls = []

    def run(self, *given):
        self.calls.append(given)


class Stubbed(triton._Driver):
    """The machinery of a GPU without the driver."""

    target = "sm_90"
    launched: dict = {}

    def settle(self, kind, eps, aligned):
        make = partial(triton._made, kind, target=triton._target(self.target), aligned=aligned)
        machine = MACHINES[self.target]
        maker = Maker(kind, machine, eps, triton.module_of, make, triton._report)
        found = maker.settled(self.choose, kind.only)
        silent = {launch.name: Silent() for launch, _ in found}
        self.launched.update(silent)
        return [
            (launch, triton.start(launch, silent[launch.name], 0, lambda device: 7))
            for launch, _ in found
        ]

    def guard(self, tensor):
        return None

    def stream(self, tensor):
        return 7
