"""The memory of a frozen audio language model: :class:`MALAdapter`, what a user holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MALConfig
from ..dialogues import Dialogue, DialogueStore, TurnReport
from ..dialogues.weights import WeightsDigest
from ..errors import ArgumentError, HostError
from ..hosts import Host
from ..memory import NeuralMemory
from ..state import MemoryState
from . import hub
from .hooks import Hooks, is_hooked
from .scope import Scopes


class _Attachment(NamedTuple):
    """A host, what is hooked into it, and what gives it back as it was."""

    host: Host
    hooks: Hooks
    undo: ExitStack


class MALAdapter(nn.Module):
    """A memory of the dialogue for a frozen audio language model.

    The adapter is never part of the host: through hooks it reads its memory into the hidden states
    of the audio tokens, and writes each turn once, when its call has succeeded. Until
    it is trained the output of the frozen host does not change by a bit. Freezing can itself move
    the last digit of a host, since torch folds matrix products another way for weights that require
    gradients.

    Threads and asyncio tasks can share an adapter. Servers call the host through a dialogue, whose
    calls are its turns wherever they run; in scripts, ``with mal.dialogue(...)`` makes turns of it
    out of calls of the host. Whether the host can run in several threads at once is for it to say.

    A copy of an adapter, by ``copy.deepcopy`` or ``pickle``, is attached to nothing, and a copy of
    its host is a host without an adapter.

    Args:
        config: see :class:`MALConfig`; its defaults if ``None``.

    Attributes:
        config: a copy of ``config``, completed by :meth:`attach`.
        memory: the :class:`NeuralMemory`; ``None`` until the width of the host is known.
        dialogues: the :class:`DialogueStore`.
        last_turn: a :class:`TurnReport` on the last turn of any thread, or ``None``;
            ``Dialogue.last_turn`` is on that of one dialogue.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> host = tiny_host("qwen2_audio")
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
        >>> with mal.dialogue("call-17") as dialogue:
        ...     answer = host.generate(**tiny_inputs(host, [[6]]), max_new_tokens=2)
        >>> dialogue.turns
        [1]
        >>> other = mal.dialogue("call-18")  # in a server, with nothing open
        >>> answer = other.generate(**tiny_inputs(host, [[4]]), max_new_tokens=2)
        >>> other.turns
        [1]
        >>> mal.detach()
    """

    def __init__(self, config: MALConfig | None = None) -> None:
        super().__init__()
        self.config = replace(config or MALConfig())
        self.memory: NeuralMemory | None = None
        if self.config.hidden_size is not None:
            self.memory = self._new_memory(self.config.hidden_size)
        weights = WeightsDigest(self._memory_weights)
        self.dialogues = DialogueStore(self.config, self._initial_state, weights)
        self.last_turn: TurnReport | None = None
        self._scopes = Scopes()
        self._attachment: _Attachment | None = None

    def __getstate__(self) -> dict[str, Any]:
        # what a copy starts from: attached to nothing, inside of nothing
        return {**vars(self), "_attachment": None, "_scopes": Scopes()}

    def _new_memory(self, hidden_size: int) -> NeuralMemory:
        # one chunk per turn: a turn writes the mean of its tokens' gradients, whatever its length
        memory = NeuralMemory(
            hidden_size,
            step="chunk",
            chunk_size=None,
            zero_init_output=True,
            **self.config.memory_options(),
        )
        return memory.float()  # whatever the default dtype

    def _memory(self) -> NeuralMemory:
        if self.memory is None:
            raise ArgumentError(
                "MALConfig.hidden_size is None, so there are no weights yet; call attach(model) "
                "first, or pass the width of the host."
            )
        return self.memory

    def _memory_weights(self) -> Mapping[str, Tensor]:
        return self._memory().state_dict(keep_vars=True)

    def _initial_state(self, rows: int) -> MemoryState:
        return self._memory().initial_state(rows)

    # --- attach and detach ------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, freeze: bool = True) -> MALAdapter:
        """Connects the adapter to ``model`` and returns the adapter.

        Create the optimizer afterwards: a new adapter gets its weights here, on the device of the
        site. They stay float32 whatever the dtype of the host.

        Args:
            model: a host known to :func:`register_host`, or a ``PeftModel`` or ``torch.compile``
                of one.
            freeze: whether to set ``requires_grad=False`` on all parameters of ``model``, until
                :meth:`detach`. With ``False`` they are left as they are, to train LoRA along, and
                so is every bit of the output.

        Raises:
            HostError: already attached, unknown host, or a site that cannot work in it.
        """
        host = Host.of(getattr(model, "_orig_mod", model))
        self._check_free(host)
        site = host.site(self.config.site)
        if self.config.hidden_size not in (None, host.hidden_size):
            raise HostError(
                f"hidden_size is {self.config.hidden_size}, but {type(host.model).__name__} has "
                f"{host.hidden_size}; attach a host of the kind this adapter was made for."
            )
        if self.memory is None:
            self.memory = self._new_memory(host.hidden_size)
        self.config.hidden_size = host.hidden_size
        if self.config.base_model_name_or_path is None:
            config = getattr(host.whole, "config", None)
            self.config.base_model_name_or_path = getattr(config, "_name_or_path", None) or None
        device = next(site.parameters()).device
        if device.type != "meta":  # offloaded weights have no device of their own
            self.memory.to(device)
        hooks = Hooks(host, site, self._memory, self.config, self._scopes, self._keep_report)
        with ExitStack() as undo:
            for parameter in host.whole.parameters() if freeze else ():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            undo.callback(host.checkpoint_again, site)
            hooks.attach(undo)
            undo.callback(self._scopes.attached_to, None)
            self._scopes.attached_to(model, hooks.guards.opened)
            self._attachment = _Attachment(host, hooks, undo.pop_all())
        return self

    def _check_free(self, host: Host) -> None:
        if self._attachment is not None:
            name = type(self._attachment.host.model).__name__
            raise HostError(f"this adapter is attached to a {name} already; call detach() first.")
        if is_hooked(host.model):
            raise HostError(
                f"this {type(host.model).__name__} has an adapter already; call its detach() first."
            )

    def _keep_report(self, dialogue: Dialogue | None, report: TurnReport) -> None:
        self.last_turn = report
        if dialogue is not None:
            dialogue.last_turn = report

    def detach(self) -> None:
        """Leaves the host exactly as :meth:`attach` found it. Weights and dialogues stay here.

        Raises:
            HostError: not attached, or a turn is under way, which would be lost.
        """
        if self._attachment is None:
            raise HostError("this adapter is not attached; call attach(model) first.")
        if self._attachment.hooks.under_way:
            raise HostError("a turn of this host is under way; call detach() when it has ended.")
        self._attachment.undo.close()
        self._attachment = None

    # --- dialogues --------------------------------------------------------------------------------

    def dialogue(
        self,
        ids: str | Sequence[str],
        speaker: str | Sequence[str | None] | None = None,
        *,
        turn_id: str | Sequence[str | None] | None = None,
        remember_again: bool = False,
        wait: float | None = None,
    ) -> Dialogue:
        """A dialogue through which the host is called, or inside of which it is.

        A call with audio (``generate``, or a forward call outside of it) is one turn: it reads what
        the dialogue remembers and, if it succeeds, writes its audio once. Several clips in one
        prompt are turns in order, and clips that repeat the last ones of the dialogue are not
        written again. Outside of any dialogue each call starts from nothing and nothing is kept.

        Args:
            ids: id of the dialogue, or one per row of the batch.
            speaker: who speaks, or one per row. A speaker has a memory of their own in the
                dialogue, which their turns read; turns write it and the one that all share. With
                ``None`` a turn reads and writes the shared one.
            turn_id: name of the turn, or one per row, that no other turn of the dialogue has. A
                turn whose name was written before is a retry, whatever came between: it is not
                written, and reads what the first one read while that can be undone, in this
                process, or else what is remembered now. One that is new is written, also if it
                sounds as the last one did.
            remember_again: whether clips that repeat the last ones are written again.
            wait: seconds, at most, that ``dialogue.generate(...)`` and ``dialogue(...)`` wait for
                other waiting turns of these dialogues, in other processes too if the store is a
                folder or Redis. ``None``: of two at the same time the one that ends last is
                refused, after its answer.

        ``dialogue.generate(...)`` and ``dialogue(...)`` are turns of that dialogue wherever they
        run. Servers, generators and callbacks use these.

        Within ``with mal.dialogue(...)`` calls of the host itself are turns, in the thread or
        asyncio task that opened it. A call in another thread belongs to the dialogue if it runs in
        a ``contextvars.copy_context()``, while the block lasts: afterwards it is refused, and so is
        a call without a dialogue while one is open elsewhere, a call for another dialogue in the
        middle of a turn, and a ``with`` in a generator, whose caller would be inside of it, too.

        Raises:
            ArgumentError: see :class:`Dialogue`.
        """
        return Dialogue(
            self.dialogues,
            ids,
            speaker,
            turn_id=turn_id,
            remember_again=remember_again,
            wait=wait,
            scopes=self._scopes,
        )

    def audio_mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """Within this context, calls of the host have audio at the positions ``mask`` ``[B, S]``.

        For prompts given as ``inputs_embeds``, in which audio cannot be found by its token. A clip
        is a run of audio positions.

        Args:
            mask: bool, the shape of the prompt.

        Raises:
            ArgumentError: ``mask`` is not that.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from mal_kernels import MALAdapter
            >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2)
            >>> llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
            >>> mal, embeds = MALAdapter().attach(llama), torch.randn(1, 6, 8)
            >>> mask = torch.tensor([[False, True, True, True, True, False]])
            >>> with mal.dialogue("call-17") as dialogue, mal.audio_mask(mask):
            ...     _ = llama(inputs_embeds=embeds)
            >>> dialogue.turns
            [1]
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ArgumentError(f"mask is {what}; pass a bool tensor [batch, positions].")
        return self._scopes.within(self._scopes.masks, mask=mask)

    def undo(self) -> None:
        """Drops the last turn of the dialogue that is open now.

        Raises:
            ArgumentError: none is open, or it has no turn left to undo.
        """
        dialogue = self._scopes.current().dialogue
        if dialogue is None:
            raise ArgumentError(
                "undo() outside of dialogue(...); open the dialogue that is to lose its last turn."
            )
        dialogue.undo()

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within this context the host, frozen or not, is itself: nothing is read or written."""
        return self._scopes.within(enabled=False)

    # --- persistence ------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and a README card.

        Weights are written as float32, whatever their dtype. Dialogues are saved apart, by
        ``mal.dialogues.save(path)``.

        Raises:
            ArgumentError: the adapter has no weights yet.
            StoreError: a file cannot be written.
        """
        self._memory()
        hub.save(Path(save_directory), self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, model_id: str | Path, *, is_trainable: bool = False, **hub_kwargs: Any
    ) -> MALAdapter:
        """An adapter saved by :meth:`save_pretrained`, to be attached to its host.

        Args:
            model_id: a folder, or the id of a repository on the Hugging Face hub.
            is_trainable: whether its parameters require gradients.
            hub_kwargs: ``revision``, ``token``, ``cache_dir`` and so on, for ``hf_hub_download``.

        Raises:
            CheckpointError: not found, corrupt, or not an adapter of this library.
        """

        def expected(config: MALConfig) -> Mapping[str, Tensor]:
            with torch.device("meta"):  # nothing is allocated before the file is known to fit
                weights: Mapping[str, Tensor] = cls(config).state_dict()
            return weights

        config, tensors = hub.load(model_id, expected, hub_kwargs)
        adapter = cls(config)
        adapter.load_state_dict(tensors)
        return adapter.requires_grad_(is_trainable)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload MAL adapter",
    ) -> str:
        """Saves the adapter to a repository on the Hugging Face hub and returns its address."""
        return hub.push(self.save_pretrained, repo_id, private, token, commit_message)

    def print_trainable_parameters(self) -> None:
        """Prints the number of trainable parameters and of all, with those of an attached host."""
        own = list(self.parameters())
        host = self._attachment.host.whole.parameters() if self._attachment else ()
        every = own + list(host)
        trainable = sum(p.numel() for p in every if p.requires_grad)
        total = sum(p.numel() for p in every)
        share = 100 * trainable / max(total, 1)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )
