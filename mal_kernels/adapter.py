"""Memory-as-a-Layer for a frozen audio language model: attach, hooks, turn, persistence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        self._mask: Tensor | None = None
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
            config: Any = host.whole.config
            self.config.base_model_name_or_path = getattr(config, "_name_or_path", None) or None
        device = next(site.parameters()).device
        if device.type != "meta":  # offloaded weights have no device of their own
            self.memory.to(device)
        # where clips begin is known only when they are there: torch.compile leaves this to Python
        self._eagerly = torch.compiler.disable(lambda function, *args: function(*args))
        with ExitStack() as undo:
            for parameter in host.whole.parameters() if freeze else ():
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
        ]
        if self.config.site == "embeds" and not host.spec.encoder:
            handles += [site.register_forward_pre_hook(self._at_embeds, with_kwargs=True)]
        else:
            at_output = self._at_encoder if host.spec.encoder else self._at_layer
            # before any hook of transformers that records hidden states
            handles += [site.register_forward_hook(at_output, prepend=True)]
        for handle in handles:
            undo.callback(handle.remove)
        if hasattr(model, "generate"):
            self._wrap_generate(host, undo)

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
        host, mask = attachment.host, self._mask
        inputs = host.arguments(args, kwargs)
        shape = host.shape(inputs)
        if shape is not None and shape[1] == 1 and not host.spec.streaming:
            return
        # a mask is that of the prompt, which is the first call in generate
        listens = host.carries_audio(inputs) if mask is None else not (turn and turn.rounds)
        if not listens:
            return
        host.checkpoint_never(attachment.site)
        self._turn = turn or Turn(self._memory(), self._dialogue)
        if not host.spec.encoder:
            self._eagerly(self._turn.hear, host, inputs, mask)

    def _at_embeds(
        self, site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        attachment, turn = self._attachment, self._expecting()
        if attachment is None or turn is None:
            return None
        return attachment.host.edit_input(args, kwargs, partial(self._eagerly, turn.inject))

    def _at_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        attachment, turn = self._attachment, self._expecting()
        if attachment is None or turn is None:
            return None
        return attachment.host.edit_output(output, partial(self._eagerly, turn.inject))

    def _at_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # generate runs the encoder before the model, which does not get to see the audio
        attachment, turn = self._attachment, self._turn if self._enabled else None
        if attachment is None or turn is None:
            return None
        if turn.rounds:
            raise HostError(
                "the encoder ran again in one call, as for audio longer than its window or for "
                "another temperature; pass one window and one temperature in each call."
            )
        self._eagerly(turn.hear, attachment.host, *attachment.host.encoded(output))
        return attachment.host.edit_output(output, partial(self._eagerly, turn.inject))

    def _expecting(self) -> Turn | None:
        """The turn that the hidden states at the site belong to, if their call has audio."""
        turn = self._turn if self._enabled else None
        return None if turn is None or turn.waiting is None else turn

    def _after_host(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        turn = self._turn
        if turn is not None and not turn.generating:
            self._turn = None
            self.last_turn = self._eagerly(turn.commit) or self.last_turn

    def _wrap_generate(self, host: Host, undo: ExitStack) -> None:
        model: Any = host.model
        own, generate = model.__dict__.get("generate"), model.generate

        @wraps(generate)
        def generate_one_turn(*args: Any, **kwargs: Any) -> Any:
            inside = self._turn is not None and self._turn.generating
            if not self._enabled or self._attachment is None or inside:
                return generate(*args, **kwargs)
            names = ("inputs", "input_ids", "inputs_embeds", *host.spec.audio_inputs)
            given = [*args[:1], *map(kwargs.get, names)]
            batch = next((len(x) for x in given if hasattr(x, "__len__")), None)
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

    @contextmanager
    def audio_mask(self, mask: Tensor) -> Iterator[None]:
        """Within this context, calls of the host hear audio at the positions ``mask`` ``[B, S]``.

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
        outer, self._mask = self._mask, mask
        try:
            yield
        finally:
            self._mask = outer

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
        host = self._attachment.host.whole.parameters() if self._attachment else ()
        every = mine + list(host)
        trainable = sum(p.numel() for p in every if p.requires_grad)
        total = sum(p.numel() for p in every)
        share = 100 * trainable / max(total, 1)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )
