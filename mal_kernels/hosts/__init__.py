"""Where audio is in a host model.

:mod:`~mal_kernels.hosts.spec` says what has to be known of a type of host,
:mod:`~mal_kernels.hosts.table` lists the types that are known,
:mod:`~mal_kernels.hosts.host` is one model at run time, and
:mod:`~mal_kernels.hosts.clips` finds and recognises the clips of a prompt.
"""

from .clips import Clip, fingerprint, placed, turn_mark
from .host import Host
from .spec import HostSpec, find_decoder, last_effective_layer, register_host
from .table import BUILT_IN

__all__ = [
    "BUILT_IN",
    "Clip",
    "Host",
    "HostSpec",
    "find_decoder",
    "fingerprint",
    "last_effective_layer",
    "placed",
    "register_host",
    "turn_mark",
]
