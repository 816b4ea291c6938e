"""What the tests of weights share."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

# what copies a value or a count from a GPU to the host, hence waits for all of its work
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class NoSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert not name.startswith(SYNCHRONISING), f"{name} reads a value back"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_synchronisation():
    """A context in which no operation may make the host wait for a device."""
    return NoSynchronisation()
