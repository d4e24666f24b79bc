"""Memory-as-a-Layer for a frozen audio language model: attach, hooks, turn, persistence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MALConfig
from ..dialogues import Dialogue, DialogueStore
from ..dialogues.files import read_json, read_tensors, write_tensors
from ..errors import ArgumentError, CheckpointError, HostError
from ..hosts import Host
from ..memory import NeuralMemory
from ..state import MemoryState
from .hub import find_file, model_card
from .report import TurnReport
from .turn import Turn

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class _Scope(NamedTuple):
    """What the context managers of an adapter say about the calls made within them."""

    dialogue: Dialogue | None = None
    mask: Tensor | None = None
    enabled: bool = True


NO_SCOPE = _Scope()
# of every adapter that has one, in this thread or asyncio task
_SCOPES: ContextVar[Mapping[MALAdapter, _Scope] | None] = ContextVar("scopes", default=None)


class _Attachment(NamedTuple):
    """A host, where it is hooked, and what gives it back as it was."""

    host: Host
    site: nn.Module
    undo: ExitStack


class MALAdapter(nn.Module):
    """A memory of the dialogue for a frozen audio language model.

    The adapter is never part of the host: through hooks it reads its memory into the hidden states
    of the audio tokens, and writes each turn once, when the call that heard it has succeeded. Until
    it is trained the output of the frozen host does not change by a bit. Freezing can itself move
    the last digit of a host, since torch folds matrix products another way for weights that require
    gradients.

    Threads and asyncio tasks can share an adapter: each has its own open dialogue and its own turn.
    Whether the host itself can run in several threads at once is for the host to say.

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
        # by thread, which a call of the host never leaves: turns of a generate that is under way,
        # and of a forward call with audio that is
        self._generating: dict[int, Turn] = {}
        self._listening: dict[int, Turn] = {}
        # of all threads and tasks
        self._open_dialogues: dict[object, _Scope] = {}
        self._open_masks: dict[object, _Scope] = {}
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
                :meth:`detach`. With ``False`` they are left as they are, to train LoRA along, and
                so is every bit of the output.

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
            config = getattr(host.whole, "config", None)
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
        if host.projector is not None or (self.config.site == "embeds" and not host.spec.encoder):
            embeds = host.site("embeds")
            handles += [embeds.register_forward_pre_hook(self._at_embeds, with_kwargs=True)]
        if self.config.site != "embeds" or host.spec.encoder:
            at_output = self._at_encoder if host.spec.encoder else self._at_layer
            # before any hook of transformers that records hidden states
            handles += [site.register_forward_hook(at_output, prepend=True)]
        for handle in handles:
            undo.callback(handle.remove)
        if host.projector is not None:
            self._watch(host.projector, undo)
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
        self._attachment = None

    # --- hooks ------------------------------------------------------------------------------------
    # They decide by Python facts, and a decode step leaves at the first of them: a compiled decode
    # step has no graph break and no recompilation because of them. What belongs to a thread is
    # looked up outside of compiled code, which would keep what it saw the first time.

    def _before_host(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._attachment is not None:
            host = self._attachment.host
            inputs = host.arguments(args, kwargs)
            if self._listening or self._may_hear(host, inputs):
                self._eagerly(self._begin, self._attachment, inputs)

    def _may_hear(self, host: Host, inputs: Mapping[str, Any]) -> bool:
        if host.projector is not None:
            return True  # which is known when its projector runs
        shape = host.shape(inputs)
        if shape is not None and shape[1] == 1 and not host.spec.streaming:
            return False
        return host.carries_audio(inputs) or bool(self._open_masks)

    def _begin(self, attachment: _Attachment, inputs: Mapping[str, Any]) -> None:
        me, scope, host = get_ident(), self._scope(), attachment.host
        self._listening.pop(me, None)  # left behind by a call that failed
        if not scope.enabled or not self._may_hear(host, inputs):
            return
        turn = self._generating.get(me)
        # a mask is that of the prompt, which is the first call in generate
        heard = turn is not None and turn.rounds
        if host.projector is None and not (
            host.carries_audio(inputs) if scope.mask is None else not heard
        ):
            return
        host.checkpoint_never(attachment.site)
        turn = turn or self._new_turn(scope, inputs)
        if not host.spec.encoder and host.projector is None:
            turn.hear(host, host.prompted(inputs, turn.given), scope.mask)
        self._listening[me] = turn

    def _new_turn(
        self,
        scope: _Scope,
        given: Mapping[str, Any],
        batch: int | None = None,
        generating: bool = False,
    ) -> Turn:
        if scope.dialogue is None and self._open_dialogues:
            raise ArgumentError(
                "no dialogue() is open in this thread or asyncio task, but one is in another: the "
                "turn would be lost. Open it where the host is called, or run the call in a "
                "contextvars.copy_context(), as asyncio.to_thread does."
            )
        return Turn(
            self._memory(),
            scope.dialogue,
            given,
            batch,
            generating=generating,
            max_state_norm=self.config.max_state_norm,
        )

    def _at_embeds(
        self, site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._attachment is None or not self._listening:
            return None
        return self._eagerly(self._edit_embeds, self._attachment.host, args, kwargs)

    def _edit_embeds(
        self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds, put = host.embeds_of(args, kwargs)
        if embeds is None:
            return None
        turn = self._listening.get(get_ident())
        if turn is not None and turn.projected:
            turn.find(host, embeds, kwargs.get("attention_mask"))
        reads_here = self.config.site == "embeds"
        return put(self._inject(embeds)) if reads_here else None

    def _at_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._attachment is None or not self._listening:
            return None
        return self._eagerly(self._edit_output, self._attachment.host, output)

    def _edit_output(self, host: Host, output: Any) -> Any:
        hidden, put = host.hidden_of(output)
        return put(self._inject(hidden))

    def _inject(self, hidden: Tensor) -> Tensor:
        me = get_ident()
        turn = self._listening.get(me)
        if turn is None or turn.waiting is None:
            return hidden
        hidden = turn.inject(hidden)
        if turn.generating:
            self._listening.pop(me)  # until the next call with audio
        return hidden

    def _project(self, output: Tensor) -> None:
        turn = self._current()
        if turn is not None:
            turn.projected.append(output)
            self._listening[get_ident()] = turn

    def _current(self) -> Turn | None:
        """The turn of this thread; ``generate`` may run parts of the model without the whole."""
        me = get_ident()
        turn = self._listening.get(me) or self._generating.get(me)
        return turn if self._scope().enabled else None

    def _at_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._attachment is None or not (self._listening or self._generating):
            return None
        return self._eagerly(self._hear_encoder, self._attachment.host, output)

    def _hear_encoder(self, host: Host, output: Any) -> Any:
        # generate runs the encoder before the model, which does not get to see the audio
        turn = self._current()
        if turn is None:
            return None
        if turn.rounds:
            raise HostError(
                "the encoder ran again in one call, as for audio longer than its window or for "
                "another temperature; pass one window and one temperature in each call."
            )
        turn.hear(host, *host.encoded(output, turn.given))
        hidden, put = host.hidden_of(output)
        return put(turn.inject(hidden))

    def _after_host(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listening:
            self._eagerly(self._end)

    def _end(self) -> None:
        me = get_ident()
        turn = self._listening.pop(me, None)
        if turn is not None and me not in self._generating:
            self.last_turn = turn.commit() or self.last_turn

    def _wrap_generate(self, host: Host, undo: ExitStack) -> None:
        generate: Any = host.model.generate

        @wraps(generate)
        def generate_one_turn(*args: Any, **kwargs: Any) -> Any:
            me, scope = get_ident(), self._scope()
            if not scope.enabled or self._attachment is None or me in self._generating:
                return generate(*args, **kwargs)
            given = host.arguments(args, kwargs, generate)
            turn = self._new_turn(scope, given, host.batch(given), generating=True)
            self._listening.pop(me, None)  # left behind by a call that failed
            self._generating[me] = turn
            try:
                output = generate(*args, **kwargs)
                with torch.no_grad():
                    self.last_turn = turn.commit() or self.last_turn
            finally:
                self._generating.pop(me)
                self._listening.pop(me, None)
            return output

        generate_one_turn.mal_adapter = self  # type: ignore[attr-defined]
        undo.callback(_replace(host.model, "generate", generate_one_turn))

    def _watch(self, projector: nn.Module, undo: ExitStack) -> None:
        forward = projector.forward

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._listening or self._generating:
                self._eagerly(self._project, output)
            return output

        # not a hook: some hosts call the forward of their projector, which passes hooks by
        undo.callback(_replace(projector, "forward", watched))

    # --- dialogues --------------------------------------------------------------------------------

    def _scope(self) -> _Scope:
        return (_SCOPES.get() or {}).get(self, NO_SCOPE)

    @contextmanager
    def _within(self, register: dict[object, _Scope] | None = None, **says: Any) -> Iterator[None]:
        outer, key = self._scope(), object()
        scope = outer._replace(**says)
        if register is not None:
            register[key] = scope
        _SCOPES.set({**(_SCOPES.get() or {}), self: scope})
        try:
            yield
        finally:
            others = {
                adapter: x for adapter, x in (_SCOPES.get() or {}).items() if adapter is not self
            }
            # without an entry that would keep the adapter alive
            _SCOPES.set(others if outer is NO_SCOPE else {**others, self: outer})
            if register is not None:
                del register[key]

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

        The context is that of the thread or asyncio task that opens it. A call of the host in
        another thread, as for a streamer, belongs to the dialogue if it runs in a
        ``contextvars.copy_context()``; if it has no dialogue while one is open it is refused.

        Raises:
            ArgumentError: see :class:`Dialogue`.
        """
        dialogue = Dialogue(self.dialogues, ids, speaker)
        with self._within(self._open_dialogues, dialogue=dialogue):
            yield dialogue

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
        with self._within(self._open_masks, mask=mask):
            yield

    def undo(self) -> None:
        """Drops the last turn of the dialogue that is open now.

        Raises:
            ArgumentError: none is open, or it has no turn left to undo.
        """
        dialogue = self._scope().dialogue
        if dialogue is None:
            raise ArgumentError(
                "undo() outside of dialogue(...); open the dialogue that is to lose its last turn."
            )
        dialogue.undo()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the host, frozen or not, is itself: nothing is read or written."""
        with self._within(enabled=False):
            yield

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
        with torch.device("meta"):  # nothing is allocated before the file is known to fit
            like = cls(config).state_dict()
        tensors, _ = read_tensors(weights_file, "adapter", lambda header: like)
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


def _replace(module: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Puts ``method`` in the place of one of ``module``; returns what takes it out again."""
    own = module.__dict__.get(name)
    setattr(module, name, method)

    def restore() -> None:
        if module.__dict__.get(name) is method:
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)

    return restore
