"""PTX instructions as numbers: what :mod:`.machine` hands to the executor in ``csrc/ptx``.

A *form* turns the modifiers and arguments of one opcode into an operation of ``codes.inc``, its
operands and up to three flags; what the flags mean stands beside each operation in ``csrc/ptx``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .codes import COMPARISON, OP, SPECIAL, TYPE
from .flow import Jump, meeting_points
from .source import Source

Operand = tuple[int, int]
REGISTER, CONSTANT, NAMED, SYMBOL = range(4)  # Kind of machine.h
ROUNDING = {"rni": 1, "rzi": 2, "rmi": 3, "rpi": 4}
SPACES = ("generic", "shared", "global")
ORDERS = {"weak": 0, "relaxed": 1, "volatile": 1, "acquire": 2, "release": 3, "acq_rel": 4}
ENDS = {OP["EXIT"], OP["TRAP"]}


class NotDecoded(NotImplementedError):
    """The machine does not know an instruction; the message says which and where."""


class Instruction(NamedTuple):
    """One row of the decoded program: the ``Instruction`` of ``machine.h``."""

    op: int
    type: int
    source: int
    flag0: int
    flag1: int
    flag2: int
    predicate: int
    is_negated: int
    operands: int
    first: int
    target: int
    line: int


@dataclass
class Form:
    """The operation that one opcode becomes."""

    op: str
    operands: list[Operand]
    flags: Sequence[int] = ()
    type: str | None = None  # None: the last modifier that is one
    source: str = "none"


@dataclass
class Program:
    """A decoded kernel."""

    code: list[Instruction] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)


class Arguments:
    """The arguments of one instruction, as operands."""

    def __init__(self, decoder: Decoder, mods: list[str], texts: list[str]) -> None:
        self.decoder, self.mods, self.texts = decoder, mods, texts

    def all(self) -> list[Operand]:
        """Every argument is one operand."""
        return [self.decoder.value(text) for text in self.texts]

    def flat(self, *which: int) -> list[Operand]:
        """The operands of a few arguments, vectors as their parts."""
        texts = (part for i in which for part in self.texts[i].strip("{} ").split(","))
        return [self.decoder.value(text) for text in texts]

    def pair(self, which: int = 0) -> list[Operand]:
        """The one or two results of ``d|p``."""
        return [self.decoder.value(text) for text in self.texts[which].split("|")]

    def rest(self, start: int) -> list[Operand]:
        """The arguments from ``start`` on, each one operand."""
        return [self.decoder.value(text) for text in self.texts[start:]]

    def address(self, which: int) -> list[Operand]:
        """Base and offset of ``[base+offset]``."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.texts[which])
        if not found:
            raise NotDecoded(f"address {self.texts[which]}")
        return [self.decoder.value(found[1]), (CONSTANT, int(found[2] or "0", 0))]

    @property
    def space(self) -> int:
        """The state space that a modifier names."""
        named = (i for i, n in enumerate(SPACES) for mod in self.mods if mod.startswith(n))
        return next(named, 0)

    @property
    def order(self) -> int:
        """How a memory instruction is ordered with others."""
        return next((ORDERS[mod] for mod in self.mods if mod in ORDERS), 0)

    def has(self, mod: str) -> int:
        """Whether a modifier is there, as a flag."""
        return int(mod in self.mods)

    def choice(self, *names: str) -> int:
        """Which of ``names`` is a modifier."""
        return next(i for i, name in enumerate(names) if name in self.mods)


# --- forms of opcodes -----------------------------------------------------------------------------


def _as(op: str, *flags: str) -> Callable[[Arguments], Form]:
    """A form whose operands are its arguments and whose flags are modifiers that may be there."""
    return lambda a: Form(op, a.all(), [a.has(flag) for flag in flags])


def _nothing(op: str) -> Callable[[Arguments], Form]:
    return lambda a: Form(op, [], type="none")


def _mov(a: Arguments) -> Form:
    if a.texts[1].startswith("{"):
        return Form("MOV_PACK", a.flat(0, 1))
    if a.texts[0].startswith("{"):
        return Form("MOV_UNPACK", a.flat(0, 1))
    return Form("MOV", a.all())


def _mul(a: Arguments) -> Form:
    kinds = {"wide": "MUL_WIDE", "hi": "MUL_HI", "lo": "MUL_LO"}
    op = next((kinds[mod] for mod in a.mods if mod in kinds), "MUL")
    return Form(op, a.all(), [a.has("ftz")])


def _extremum(op: str) -> Callable[[Arguments], Form]:
    def form(a: Arguments) -> Form:
        if a.has("NaN") or a.has("xorsign"):
            raise NotDecoded("a maximum that keeps NaN")
        return Form(op, a.all(), [a.has("ftz")])

    return form


def _cvta(a: Arguments) -> Form:
    return Form("CVTA", a.all(), [a.space, a.has("to")])


def _setp(a: Arguments) -> Form:
    combine = {"and": 1, "or": 2, "xor": 3}
    results = a.pair()
    with_predicate = next((combine[mod] for mod in a.mods if mod in combine), 0)
    how = a.has("ftz") | (len(results) > 1) << 1 | a.texts[-1].startswith("!") << 2
    return Form("SETP", results + a.rest(1), [COMPARISON[a.mods[0]], with_predicate, how])


def _cvt(a: Arguments) -> Form:
    to, *_, source = types = [mod for mod in a.mods if mod in TYPE]
    rounding = next((ROUNDING[mod] for mod in a.mods if mod in ROUNDING), 0)
    if len(types) < 2 or a.has("relu") or (a.has("rz") and source == "f32"):
        raise NotDecoded("a conversion")
    op = "CVT_PACK" if to in ("bf16x2", "f16x2") else "CVT"
    return Form(op, a.all(), [rounding, a.has("sat")], to, source)


def _ld(a: Arguments) -> Form:
    operands = a.flat(0) + a.address(1)
    if a.mods[0].startswith("param"):
        return Form("LD_PARAM", operands)
    return Form("LD", operands, [a.space, 8 if a.mods[-1].endswith("64") else 4, a.order])


def _st(a: Arguments) -> Form:
    if a.order:
        raise NotDecoded("an ordered store")
    return Form("ST", a.address(0) + a.flat(1), [a.space])


def _atom(a: Arguments) -> Form:
    what = a.choice("add", "exch", "max", "cas", "or")
    operands = [a.decoder.value(a.texts[0]), *a.address(1), *a.rest(2)]
    return Form("ATOM", operands, [a.space, what, a.order or ORDERS["relaxed"]])


def _red(a: Arguments) -> Form:
    a.texts.insert(0, "_")
    return _atom(a)


def _shfl(a: Arguments) -> Form:
    results = a.pair()
    flags = [a.choice("bfly", "up", "down", "idx"), int(len(results) > 1)]
    return Form("SHFL", results + a.rest(1), flags)


def _vote(a: Arguments) -> Form:
    return Form(
        "VOTE", a.all(), [a.choice("ballot", "any", "all"), int(a.texts[1].startswith("!"))]
    )


def _redux(a: Arguments) -> Form:
    return Form("REDUX", a.all(), [OP[a.mods[1].upper()]])


def _bar(a: Arguments) -> Form:
    if a.has("cluster"):
        return Form("CLUSTER_ARRIVE" if a.has("arrive") else "CLUSTER_WAIT", [], type="none")
    if a.has("warp"):
        return Form("BAR_WARP", [], type="none")
    if a.has("arrive") or a.has("red"):
        raise NotDecoded("a barrier that does not wait")
    return Form("BAR", a.all(), type="none")


def _fence(a: Arguments) -> Form:
    return Form("FENCE_ASYNC" if a.has("proxy") else "FENCE", [], type="none")


def _mapa(a: Arguments) -> Form:
    return Form("MAPA", a.all(), [int(a.space != SPACES.index("shared"))])


def _cp(a: Arguments) -> Form:
    if a.has("bulk"):
        if a.has("prefetch"):
            return Form("NOP", [], type="none")
        raise NotDecoded("a bulk copy")
    if a.has("commit_group"):
        return Form("CP_COMMIT", [], type="none")
    if a.has("wait_all") or a.has("wait_group"):
        return Form("CP_WAIT", a.all() or [(CONSTANT, 0)], [a.has("wait_all")], "none")
    size = int(a.texts[2], 0)
    given = a.rest(3)[:1] or [(CONSTANT, size)]
    return Form("CP_ASYNC", [*a.address(0), *a.address(1), *given], [size], "none")


def _matrices(a: Arguments) -> list[int]:
    return [(1, 2, 4)[a.choice("x1", "x2", "x4")], a.has("trans")]


def _ldmatrix(a: Arguments) -> Form:
    return Form("LDMATRIX", a.flat(0) + a.address(1), _matrices(a))


def _stmatrix(a: Arguments) -> Form:
    return Form("STMATRIX", a.address(0) + a.flat(1), _matrices(a))


def _mma(a: Arguments) -> Form:
    if not a.has("m16n8k16") or a.mods[-1] != "f32" or a.mods[-3] not in ("bf16", "f16"):
        raise NotDecoded("a shape of mma")
    return Form("MMA", a.flat(0, 1, 2, 3), type=a.mods[-3])


def _wgmma(a: Arguments) -> Form:
    for mod, op in (("fence", "FENCE"), ("commit_group", "COMMIT"), ("wait_group", "WAIT")):
        if a.has(mod):
            return Form(f"WGMMA_{op}", a.all(), type="none")
    shape = next(re.fullmatch(r"m64n(\d+)k16", mod) for mod in a.mods if mod.startswith("m64"))
    if not shape or a.mods[-1] not in ("bf16", "f16") or a.mods[-3] != "f32":
        raise NotDecoded("a shape of wgmma")
    operands = a.flat(*range(len(a.texts)))
    flags = [int(shape[1]), int(a.texts[1].startswith("{"))]
    return Form("WGMMA", operands, flags, a.mods[-1])


FLUSHABLE = (
    *("add", "sub", "div", "rem", "and", "or", "xor", "shl", "shr", "neg", "abs", "copysign"),
    *("ex2", "lg2", "rsqrt", "sqrt", "rcp", "tanh", "sin", "cos"),
)
BITWISE = ("not", "selp", "bfe", "bfi", "prmt", "lop3", "popc", "clz", "brev")
HINTS = ("prefetch", "createpolicy", "griddepcontrol", "nanosleep")
FORMS: dict[str, Callable[[Arguments], Form]] = {
    "mov": _mov,
    "mul": _mul,
    "cvta": _cvta,
    "setp": _setp,
    "cvt": _cvt,
    "ld": _ld,
    "st": _st,
    "atom": _atom,
    "red": _red,
    "shfl": _shfl,
    "vote": _vote,
    "redux": _redux,
    "bar": _bar,
    "barrier": _bar,
    "fence": _fence,
    "membar": _fence,
    "mapa": _mapa,
    "cp": _cp,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
    "wgmma": _wgmma,
    "max": _extremum("MAX"),
    "min": _extremum("MIN"),
    "mad": lambda a: Form("MAD_WIDE" if a.has("wide") else "MAD_LO", a.all()),
    "fma": _as("FMA", "ftz", "rm"),
    "shf": _as("SHF", "r", "clamp"),
    "elect": lambda a: Form("ELECT", a.pair(), type="none"),
    "activemask": _as("ACTIVEMASK"),
    "ret": _nothing("EXIT"),
    "exit": _nothing("EXIT"),
    "trap": _nothing("TRAP"),
    "bra": _nothing("BRA"),
    **{name: _as(name.upper(), "ftz") for name in FLUSHABLE},
    **{name: _as(name.upper()) for name in BITWISE},
    # hints, and what only delays
    **{name: _nothing("NOP") for name in HINTS},
}


# --- the whole kernel -----------------------------------------------------------------------------


class Decoder:
    """A decoder turns one kernel's statements into a :class:`Program`."""

    def __init__(self, source: Source) -> None:
        self.source, self.program = source, Program()
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.scopes: list[dict[str, str]] = [{}]  # names of a block's own registers
        self.count = 0  # of blocks so far

    def decode(self) -> Program:
        """Decodes every statement, then says where branches lead and where their lanes meet."""
        for kind, text, line in self.source.statements():
            if kind == "{":
                self.scopes.append({})
                self.count += 1
            elif kind == "}":
                self.scopes.pop()
            elif kind == ":":
                self.labels[text] = len(self.program.code)
            elif text.startswith("."):
                self.declare(text)
            elif text:
                self.instruction(text, line)
        self.program.code.append(self.row(Form("TRAP", [], type="none"), -1, 0, 0))
        self.set_targets()
        return self.program

    def declare(self, text: str) -> None:
        """Registers of a block in braces are its own; others are known by their names."""
        if not text.startswith(".reg"):
            if text.startswith(".local"):
                raise NotDecoded(f"local memory: {text}")
            return
        if len(self.scopes) > 1:
            for name in text.split(None, 2)[2].split(","):
                self.scopes[-1][name.strip()] = f"{name.strip()}@{self.count}"

    def instruction(self, text: str, line: int) -> None:
        """Appends the row of one instruction."""
        predicate, is_negated = -1, 0
        if guard := re.match(r"@(!?)\s*([%\w$]+)\s+", text):
            predicate, is_negated = self.register(guard[2]), int(bool(guard[1]))
            text = text[guard.end() :]
        opcode, *rest = text.split(None, 1)
        base, *mods = opcode.replace("::", "_of_").split(".")
        texts = split_arguments(rest[0] if rest else "")
        try:
            form = FORMS[base](Arguments(self, mods, texts))
        except (KeyError, StopIteration, NotDecoded) as error:
            raise NotDecoded(f"line {line}: {text} ({error!r})") from error
        if form.type is None:
            form.type = next((mod for mod in reversed(mods) if mod in TYPE), "none")
        if base == "bra":
            self.jumps.append((len(self.program.code), texts[0]))
        self.program.code.append(self.row(form, predicate, is_negated, line))

    def row(self, form: Form, predicate: int, is_negated: int, line: int) -> Instruction:
        """The numbers of a form, whose operands are appended to the program's."""
        flag0, flag1, flag2 = (*form.flags, 0, 0, 0)[:3]
        first = len(self.program.operands)
        self.program.operands += form.operands
        return Instruction(
            OP[form.op],
            TYPE[form.type or "none"],
            TYPE[form.source],
            *(flag0, flag1, flag2),
            *(predicate, is_negated, len(form.operands), first, 0, line),
        )

    def register(self, name: str) -> int:
        """The number of a register, which may be a block's own."""
        for scope in reversed(self.scopes):
            if name in scope:
                name = scope[name]
                break
        registers = self.program.registers
        return registers.setdefault(name, len(registers))

    def value(self, text: str) -> Operand:
        """An operand that is a register, a number, or a name of the launch or of memory."""
        text = text.strip()
        if text in SPECIAL:
            return NAMED, SPECIAL[text]
        if text in self.source.shared:
            return SYMBOL, self.source.shared[text]
        if text in self.source.parameters:
            return CONSTANT, self.source.parameters[text].offset
        number = constant(text)
        return (REGISTER, self.register(text.lstrip("!"))) if number is None else (CONSTANT, number)

    def set_targets(self) -> None:
        """Fills in where branches lead, and where lanes that part there meet."""
        code = self.program.code
        for at, label in self.jumps:
            code[at] = code[at]._replace(target=self.labels[label])
        jumps = [
            Jump(at, row.target if row.op == OP["BRA"] else None, row.predicate >= 0)
            for at, row in enumerate(code)
            if row.op in ENDS or row.op == OP["BRA"]
        ]
        for at, meets in meeting_points(jumps, len(code)).items():
            code[at] = code[at]._replace(flag0=meets)


def constant(text: str) -> int | None:
    """The number that a literal is, as 64 bits with a sign; None if it is no literal."""
    if text == "_":
        return 0
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        bits = int(found[1] or found[2], 16)
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        bits = int(text.rstrip("U"), 0) & (1 << 64) - 1
    elif text in ("true", "false"):
        bits = int(text == "true")
    elif text == "WARP_SZ":
        bits = 32
    else:
        return None
    return bits - (1 << 64) if bits >> 63 else bits


def split_arguments(text: str) -> list[str]:
    """The arguments at the commas that stand in no bracket."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found
