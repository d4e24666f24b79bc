"""MAL as a method of PEFT: importing this module registers it.

``get_peft_model(host, MALPeftConfig(...))`` wraps a host, and PEFT saves and loads the adapter like
any other of its own. The host stays what it is: its modules keep their places and names, and the
:class:`MALAdapter` is a sibling of the host inside PEFT's wrapper, connected to it by hooks.

Two things PEFT does are impossible here and raise: merging into the weights of the host, and
several active adapters. PEFT's list of methods is a closed enumeration, to which a member is added.
``disable_adapter()`` holds in the thread or asyncio task that is inside of it: those of others are
turns.

Example:
    >>> from peft import get_peft_model
    >>> from mal_kernels.integrations.peft import MALPeftConfig
    >>> from mal_kernels.testing import tiny_host, tiny_inputs
    >>> import warnings
    >>> warnings.simplefilter("ignore")  # PEFT 0.21 uses a name that transformers 5.23 deprecates
    >>> model = get_peft_model(tiny_host("qwen2_audio"), MALPeftConfig(heads=2, head_dim=8))
    >>> with model.base_model.mal.dialogue("call-17") as dialogue:
    ...     _ = model.generate(**tiny_inputs(model.get_base_model(), [[5]]), max_new_tokens=2)
    >>> dialogue.turns
    [1]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ..adapter import MALAdapter
from ..config import MALConfig
from ..errors import ArgumentError, needs

with needs("peft", "mal_kernels.integrations.peft"):
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import register_peft_method

NAME = "MAL"


def _add_to_peft_types() -> Any:
    """PeftType.MAL: a member added to an enumeration that has no way to add one."""
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    return member


PEFT_TYPE = PeftType.__members__.get(NAME) or _add_to_peft_types()


@dataclass
class MALPeftConfig(PeftConfig, MALConfig):  # type: ignore[misc]
    """The fields of :class:`MALConfig` and those of ``PeftConfig``.

    Raises:
        ArgumentError: see :class:`MALConfig`.

    Example:
        >>> from mal_kernels.integrations.peft import MALPeftConfig
        >>> MALPeftConfig(heads=2, site=1).peft_type.value
        'MAL'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        MALConfig.__post_init__(self)
        self.peft_type = PEFT_TYPE

    def mal_config(self) -> MALConfig:
        """The part that describes the adapter."""
        return MALConfig(**{field.name: getattr(self, field.name) for field in fields(MALConfig)})


class MALLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The adapters of a host by name, where PEFT looks for them."""

    adapter_layer_names = ("mal_adapters",)

    def __init__(self) -> None:
        super().__init__()
        self.mal_adapters = nn.ModuleDict()

    @property
    def active(self) -> MALAdapter:
        """The adapter that is attached."""
        layer: Any = self
        active: MALAdapter = layer.mal_adapters[layer.active_adapters[0]]
        return active

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapter is off in this thread or asyncio task."""
        return not self.active._scopes.innermost().enabled


class MALModel(BaseTuner):  # type: ignore[misc]
    """A host and its adapters: what a ``PeftModel`` calls its ``base_model``.

    Attributes:
        mal: the active :class:`MALAdapter`, for ``dialogue``, ``undo``, ``dialogues`` and so on.
    """

    prefix = "mal_"
    tuner_layer_cls = MALLayer
    mal_layer: Any

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        # BaseTuner would write its configuration into that of LoRA below it, and into the host
        nn.Module.__init__(self)
        self.model, self.active_adapter = model, adapter_name
        one = isinstance(peft_config, PeftConfig)
        self.peft_config = {adapter_name: peft_config} if one else peft_config
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.mal_layer = MALLayer()
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # copies of a host and of an adapter do not know each other
        super().__setstate__(state)
        self.mal.attach(self.model)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False, **_: Any
    ) -> None:
        """Makes an adapter for ``model``; attaches it if it is the first.

        Raises:
            ArgumentError: ``low_cpu_mem_usage``: the adapter needs real weights to be attached.
            HostError: see :meth:`MALAdapter.attach`.
        """
        if low_cpu_mem_usage or nn.Linear(1, 1).weight.is_meta:
            raise ArgumentError(
                "low_cpu_mem_usage is True; pass False, a MAL adapter is attached with its weights."
            )
        config = self.peft_config[adapter_name]
        adapter = MALAdapter(config.mal_config())
        first = not self.mal_layer.mal_adapters
        if not first:
            self.mal.detach()
        try:
            adapter.attach(model)
        finally:
            if not first:
                adapter.detach()
                self.mal.attach(self.model)
        config.hidden_size = adapter.config.hidden_size
        self.mal_layer.mal_adapters[adapter_name] = adapter
        adapter.requires_grad_(not config.inference_mode)
        if first:
            self.mal_layer._active_adapter = adapter_name

    @property
    def mal(self) -> MALAdapter:
        """The active adapter."""
        active: MALAdapter = self.mal_layer.active
        return active

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Attaches another adapter in the place of the active one.

        Raises:
            ArgumentError: several names, or one that is not known.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        known = self.mal_layer.mal_adapters
        if len(names) != 1 or names[0] not in known:
            raise ArgumentError(f"adapter_name is {adapter_name!r}; pass one of {list(known)}.")
        enabled = not self.mal_layer.disable_adapters
        self.mal.detach()
        self.enable_adapter_layers()
        self.mal.requires_grad_(False)
        self.mal_layer._active_adapter = self.active_adapter = names[0]
        self.mal.requires_grad_(not inference_mode)
        self.mal.attach(self.model)
        if not enabled:
            self.disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter that is not the active one.

        Raises:
            ArgumentError: it is active, or not known.
        """
        others = [n for n in self.mal_layer.mal_adapters if n != self.mal_layer.active_adapters[0]]
        if adapter_name not in others:
            raise ArgumentError(
                f"adapter_name is {adapter_name!r}; pass one that is not active, of {others}."
            )
        del self.mal_layer.mal_adapters[adapter_name], self.peft_config[adapter_name]

    def unload(self) -> nn.Module:
        """The host as it was; the adapter stays with :attr:`mal`."""
        self.mal.detach()
        return self.model

    def merge_and_unload(self, *_: Any, **__: Any) -> nn.Module:
        """Is not possible: a memory is not a change of weights.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("a MAL adapter cannot be merged into the host; call unload().")

    merge_adapter = merge_and_unload

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freezes adapters, or lets them be trained."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.mal_layer.mal_adapters[name].requires_grad_(requires_grad)

    def _create_and_replace(self, *_: Any, **__: Any) -> None:
        """Never called: no module of the host is replaced."""
        raise NotImplementedError

    def disable_adapter_layers(self) -> None:
        """Calls of the host in this thread or asyncio task neither read nor write from here on.

        Raises:
            ArgumentError: it is a generator that says so, whose caller would be affected, too.
        """
        self.mal._scopes.disable(sys._getframe(1))

    def enable_adapter_layers(self) -> None:
        """Ends what :meth:`disable_adapter_layers` began."""
        self.mal._scopes.enable()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: a memory is float32 always."""


if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="mal", config_cls=MALPeftConfig, model_cls=MALModel, prefix="mal_")
