"""Memory-as-a-Layer for a frozen audio language model: attach, hooks, turn, persistence."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .checkpoint import check_tensors, find_file, model_card, read_json, read_tensors, write_tensors
from .config import MALConfig
from .dialogue import Dialogue, DialogueStore
from .errors import ArgumentError, CheckpointError, HostError
from .hosts import Host
from .memory import NeuralMemory
from .state import MemoryState
from .turn import Turn, TurnReport

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class _Attachment(NamedTuple):
    """A host, where it is hooked, and what gives it back as it was."""

    host: Host
    site: nn.Module
    undo: ExitStack


class MALAdapter(nn.Module):
    """A memory of the dialogue for a frozen audio language model.

    The adapter is never part of the host: through hooks it reads its memory into the hidden states
    of the audio tokens, and writes each turn once, when the call that heard it has succeeded. Until
    it is trained the host's output does not change by a bit. One thread uses an adapter at a time.

    Args:
        config: see :class:`MALConfig`; its defaults if ``None``.

    Attributes:
        config: a copy of ``config``, completed by :meth:`attach`.
        memory: the :class:`NeuralMemory`; ``None`` until the width of the host is known.
        dialogues: the :class:`DialogueStore`.
        last_turn: a :class:`TurnReport` on the last turn, or ``None``.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> host = tiny_host("qwen2_audio")
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
        >>> with mal.dialogue("call-17") as dialogue:
        ...     answer = host.generate(**tiny_inputs(host, [[6]]), max_new_tokens=2)
        >>> dialogue.turns
        [1]
        >>> mal.detach()
    """

    def __init__(self, config: MALConfig | None = None) -> None:
        super().__init__()
        self.config = replace(config or MALConfig())
        self.memory: NeuralMemory | None = None
        if self.config.hidden_size is not None:
            self.memory = self._new_memory(self.config.hidden_size)
        self.dialogues = DialogueStore(self.config, self._initial_state)
        self.last_turn: TurnReport | None = None
        self._enabled = True
        self._dialogue: Dialogue | None = None
        self._turn: Turn | None = None
        self._attachment: _Attachment | None = None

    def _new_memory(self, hidden_size: int) -> NeuralMemory:
        # one chunk per turn: a turn writes the mean of its tokens' gradients, whatever its length
        return NeuralMemory(
            hidden_size,
            step="chunk",
            chunk_size=None,
            zero_init_output=True,
            **self.config.memory_options(),
        )

    def _memory(self) -> NeuralMemory:
        if self.memory is None:
            raise ArgumentError(
                "MALConfig.hidden_size is None, so there are no weights yet; call attach(model) "
                "first, or pass the width of the host."
            )
        return self.memory

    def _initial_state(self, rows: int) -> MemoryState:
        return self._memory().initial_state(rows)

    # --- attach and detach ------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, freeze: bool = True) -> MALAdapter:
        """Connects the adapter to ``model`` and returns the adapter.

        Create the optimizer afterwards: a new adapter gets its weights here, on the device of the
        site. They stay float32 whatever the dtype of the host.

        Args:
            model: a host known to :func:`register_host`, or a ``PeftModel`` of one.
            freeze: whether to set ``requires_grad=False`` on all parameters of ``model``, until
                :meth:`detach`. With ``False`` they are left as they are, to train LoRA along.

        Raises:
            HostError: already attached, unknown host, or a site that cannot work in it.
        """
        host = Host.of(model)
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
            config: Any = host.model.config
            self.config.base_model_name_or_path = getattr(config, "_name_or_path", None) or None
        device = next(site.parameters()).device
        if device.type != "meta":  # offloaded weights have no device of their own
            self.memory.to(device)
        # where clips begin is known only when they are there: torch.compile leaves this to Python
        self._eagerly = torch.compiler.disable(lambda function, *args: function(*args))
        with ExitStack() as undo:
            for parameter in host.model.parameters() if freeze else ():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            undo.callback(host.checkpoint_again, site)
            self._add_hooks(host, site, undo)
            self._attachment = _Attachment(host, site, undo.pop_all())
        return self

    def _check_free(self, host: Host) -> None:
        if self._attachment is not None:
            name = type(self._attachment.host.model).__name__
            raise HostError(f"this adapter is attached to a {name} already; call detach() first.")
        if hasattr(host.model.__dict__.get("generate"), "mal_adapter"):
            raise HostError(
                f"this {type(host.model).__name__} has an adapter already; call its detach() first."
            )

    def _add_hooks(self, host: Host, site: nn.Module, undo: ExitStack) -> None:
        model = host.model
        handles = [
            model.register_forward_pre_hook(self._before_host, with_kwargs=True),
            model.register_forward_hook(self._after_host),
            site.register_forward_pre_hook(self._at_embeds, with_kwargs=True)
            if self.config.site == "embeds"
            # before any hook of transformers that records hidden states
            else site.register_forward_hook(self._at_layer, prepend=True),
        ]
        for handle in handles:
            undo.callback(handle.remove)
        if hasattr(model, "generate"):
            self._wrap_generate(model, undo)

    def detach(self) -> None:
        """Leaves the host exactly as :meth:`attach` found it. Weights and dialogues stay here.

        Raises:
            HostError: not attached.
        """
        if self._attachment is None:
            raise HostError("this adapter is not attached; call attach(model) first.")
        self._attachment.undo.close()
        self._attachment = self._turn = None

    # --- hooks ------------------------------------------------------------------------------------
    # They decide by Python facts only, and a decode step leaves at the first of them: a compiled
    # decode step has no graph break and no recompilation because of them.

    def _before_host(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment, turn = self._attachment, self._turn
        if turn is not None and not turn.generating:
            self._turn = turn = None  # left behind by a forward call that failed
        if not self._enabled or attachment is None:
            return
        inputs = attachment.host.arguments(args, kwargs)
        ids = inputs.get("input_ids")
        if (ids is not None and ids.shape[-1] == 1) or not attachment.host.carries_audio(inputs):
            return
        attachment.host.checkpoint_never(attachment.site)
        self._turn = turn or Turn(self._memory(), self._dialogue)
        self._eagerly(self._turn.hear, attachment.host, inputs)

    def _at_embeds(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, turn = kwargs.get("inputs_embeds"), self._expecting()
        if hidden is None or turn is None:
            return None
        return args, {**kwargs, "inputs_embeds": self._eagerly(turn.inject, hidden)}

    def _at_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        turn = self._expecting()
        if turn is None:
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = self._eagerly(turn.inject, hidden)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    def _expecting(self) -> Turn | None:
        """The turn that the hidden states at the site belong to, if their call has audio."""
        turn = self._turn if self._enabled else None
        return None if turn is None or turn.waiting is None else turn

    def _after_host(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        turn = self._turn
        if turn is not None and not turn.generating:
            self._turn = None
            self.last_turn = self._eagerly(turn.commit) or self.last_turn

    def _wrap_generate(self, model: Any, undo: ExitStack) -> None:
        own, generate = model.__dict__.get("generate"), model.generate

        @functools.wraps(generate)
        def generate_one_turn(*args: Any, **kwargs: Any) -> Any:
            inside = self._turn is not None and self._turn.generating
            if not self._enabled or self._attachment is None or inside:
                return generate(*args, **kwargs)
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            batch = None if ids is None else len(ids)
            turn = self._turn = Turn(self._memory(), self._dialogue, batch, generating=True)
            try:
                output = generate(*args, **kwargs)
                with torch.no_grad():
                    self.last_turn = turn.commit() or self.last_turn
            finally:
                self._turn = None
            return output

        def restore() -> None:
            if model.__dict__.get("generate") is generate_one_turn:
                del model.generate
                if own is not None:
                    model.generate = own

        generate_one_turn.mal_adapter = self  # type: ignore[attr-defined]
        model.generate = generate_one_turn
        undo.callback(restore)

    # --- dialogues --------------------------------------------------------------------------------

    @contextmanager
    def dialogue(
        self, ids: str | Sequence[str], speaker: str | Sequence[str | None] | None = None
    ) -> Iterator[Dialogue]:
        """Within this context, calls of the host are turns of ``ids``. States stay when it ends.

        A call with audio (``generate``, or a forward call outside of it) is one turn: it reads what
        the dialogue remembers and, if it succeeds, writes its audio once. Several clips in one
        prompt are turns in order, and clips that repeat the last ones of the dialogue are not
        written again. Outside of any dialogue each call starts from nothing and nothing is kept.

        Args:
            ids: id of the dialogue, or one per row of the batch.
            speaker: who speaks, or one per row. A speaker has a memory of their own in the
                dialogue, which their turns read; turns write it and the one that all share. With
                ``None`` a turn reads and writes the shared one.

        Raises:
            ArgumentError: see :class:`Dialogue`.
        """
        outer = self._dialogue
        self._dialogue = Dialogue(self.dialogues, ids, speaker)
        try:
            yield self._dialogue
        finally:
            self._dialogue = outer

    def undo(self) -> None:
        """Drops the last turn of the dialogue that is open now.

        Raises:
            ArgumentError: none is open, or it has no turn left to undo.
        """
        if self._dialogue is None:
            raise ArgumentError(
                "undo() outside of dialogue(...); open the dialogue that is to lose its last turn."
            )
        self._dialogue.undo()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the host is exactly itself: nothing is read and nothing written."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    # --- persistence ------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and a README card.

        Dialogues are saved apart, by ``mal.dialogues.save(path)``.

        Raises:
            ArgumentError: the adapter has no weights yet.
        """
        self._memory()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_NAME, "adapter", self.state_dict(), {})
        (folder / CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(self.config.base_model_name_or_path))

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
        config_file, weights_file = (
            find_file(model_id, name, hub_kwargs) for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
        try:
            text = config_file.read_text()
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"cannot read {config_file}: {error}.") from error
        config = MALConfig.from_dict(read_json(text, str(config_file)))
        if config.hidden_size is None:
            raise CheckpointError(f"hidden_size is null in {config_file}; save the adapter again.")
        adapter = cls(config)
        tensors, _ = read_tensors(weights_file, "adapter")
        check_tensors(weights_file, tensors, adapter.state_dict())
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
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message
                )
            )

    def print_trainable_parameters(self) -> None:
        """Prints the number of trainable parameters and of all, with those of an attached host."""
        mine = list(self.parameters())
        host = self._attachment.host.model.parameters() if self._attachment else ()
        every = mine + list(host)
        trainable = sum(p.numel() for p in every if p.requires_grad)
        total = sum(p.numel() for p in every)
        share = 100 * trainable / max(total, 1)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )
