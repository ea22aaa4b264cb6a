"""Tokens to the syntax tree.

Scopes: `{ … }` inside a body declares registers and labels of its own (inline assembly does so); they are
renamed `name#scope`, so that every name is unique in its function.
"""

from __future__ import annotations

from dataclasses import replace

from ptx_emulator.errors import PtxSyntaxError
from ptx_emulator.ptx.lexer import tokens
from ptx_emulator.ptx.locations import Locations
from ptx_emulator.ptx.module import (
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Location,
    Module,
    Operand,
    Pair,
    Parameter,
    Register,
    Symbol,
    Variable,
    Vector,
)

_SPACES = (".global", ".const", ".shared", ".local")
_LINKAGE = (".visible", ".extern", ".weak", ".common")
_BRANCHES = ("bra", "brx")
_END = ""  # behind the last token

Expression = Register | Immediate | Symbol


def parse(text: str) -> Module:
    """Parses a PTX module.

    Raises:
        PtxSyntaxError: what cannot be parsed, with its line.
    """
    return _Parser(text).module()


class _Scope:
    """Names that a pair of braces declares, with what they are called outside."""

    def __init__(self, number: int, outer: _Scope | None) -> None:
        self.number = number
        self.outer = outer
        self.registers: dict[str, str] = {}
        self.known: dict[str, Register] = {}  # as operands, those of outer scopes that were used here, too
        self.labels: dict[str, str] = {}

    def rename(self, name: str) -> str:
        return f"{name}#{self.number}" if self.number else name

    def register(self, name: str) -> str | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.outer
        return None

    def label(self, name: str) -> str | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens, self._lines = tokens(text)
        self._tokens += [_END, _END]
        self._lines += [0, 0]
        self._at = 0
        self._locations = Locations(text)
        self._location: Location | None = None
        self._function: Function | None = None
        self._scope = _Scope(0, None)
        self._scopes = 0
        self._branches: list[tuple[int, _Scope]] = []  # index in the body, scope: labels may come later
        self._tables: list[tuple[str, tuple[str, ...], _Scope]] = []
        self._words: dict[str, tuple[str, tuple[str, ...]]] = {}  # opcode and modifiers of `ld.global.b32`

    # ------------------------------------------------------------------ tokens

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _next(self) -> str:
        token = self._tokens[self._at]
        if token is not _END:
            self._at += 1
        return token

    def _take(self, text: str) -> bool:
        if self._tokens[self._at] == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f"{text!r} was expected, not {self._peek()!r}")

    def _error(self, message: str, at: int | None = None) -> PtxSyntaxError:
        line = self._lines[self._at if at is None else at]
        return PtxSyntaxError(f"PTX line {line}: {message}" if line else f"at the end of the PTX: {message}")

    def _skip_statement(self) -> None:
        while self._next() not in (";", _END):
            pass

    def _integer(self) -> int:
        sign = -1 if self._take("-") else 1
        token = self._peek()
        if not _is_number(token):
            raise self._error(f"a number was expected, not {token!r}")
        self._at += 1
        return sign * _number(token)

    def _integers(self) -> tuple[int, ...]:
        values = [self._integer()]
        while self._take(","):
            values.append(self._integer())
        return tuple(values)

    # ------------------------------------------------------------------ module

    def module(self) -> Module:
        module = Module("", "")
        while self._peek() != _END:
            word = self._peek()
            if word == ".version":
                self._next()
                module.version = self._next()
            elif word == ".target":
                self._next()
                module.target = self._next()
                while self._take(","):
                    self._next()
            elif word == ".address_size":
                self._next()
                self._expect("64")
            elif word == ".file":
                self._file()
            elif word == ".section":
                self._section()
            elif word in (".pragma", ".alias"):
                self._skip_statement()
            else:
                self._declaration(module)
        if not module.target:
            raise PtxSyntaxError("the text has no .target, as every PTX module has")
        return module

    def _file(self) -> None:
        self._expect(".file")
        self._integer()
        self._next()
        while self._take(","):
            self._integer()

    def _section(self) -> None:
        while self._next() not in ("{", _END):
            pass
        depth = 1
        while depth:
            text = self._next()
            depth += (text == "{") - (text in ("}", _END))

    def _declaration(self, module: Module) -> None:
        extern = False
        while self._peek() in _LINKAGE:
            extern |= self._next() == ".extern"
        word = self._peek()
        if word in _SPACES:
            module.variables.append(self._variable(extern))
        elif word == ".entry":
            self._next()
            function = self._entry()
            module.functions[function.name] = function
        elif word == ".func":
            self._device_function()
        else:
            raise self._error(f"{word!r} begins no declaration")

    def _device_function(self) -> None:
        """A `.func`: only declarations are read over; calls go to functions the lowering knows."""
        start = self._at
        while self._peek() not in (";", "{", _END):
            self._next()
        if not self._take(";"):
            raise self._error("a .func with a body is not supported: compile with inlining", start)

    def _variable(self, extern: bool) -> Variable:
        space = self._next().removeprefix(".")
        align, element_bytes = 1, 0
        while self._peek().startswith("."):
            word = self._next()
            if word == ".align":
                align = self._integer()
            elif word.startswith(".v") and word[2:].isdigit():
                element_bytes = -int(word[2:])
            elif word in (".attribute", ".unified", ".managed"):
                if self._take("("):
                    while not self._take(")"):
                        self._next()
            else:
                size = _type_bytes(word)
                element_bytes = size * -element_bytes if element_bytes < 0 else size
        name = self._next()
        count = 1
        while self._take("["):
            count *= 0 if self._peek() == "]" else self._integer()
            self._expect("]")
        data = self._initializer(element_bytes) if self._take("=") else None
        if data is not None and count == 0:
            count = len(data) // element_bytes
        self._expect(";")
        return Variable(name, space, element_bytes * count, max(align, 1), extern, data)

    def _initializer(self, element_bytes: int) -> bytes:
        if not self._take("{"):
            return _literal_bytes(self._expression(), element_bytes)
        data = b""
        while not self._take("}"):
            if self._peek() == "{":
                data += self._initializer(element_bytes)
            else:
                data += _literal_bytes(self._expression(), element_bytes)
            self._take(",")
        return data

    # ------------------------------------------------------------------ kernels

    def _entry(self) -> Function:
        line = self._lines[self._at]
        function = Function(self._next(), line=line)
        if self._take("("):
            self._parameters(function)
        while self._peek().startswith("."):
            directive = self._next().removeprefix(".")
            if directive == "pragma":
                self._skip_statement()
            else:
                number_follows = _is_number(self._peek())
                function.directives[directive] = self._integers() if number_follows else ()
        if self._take(";"):
            return function
        self._function = function
        self._scope, self._scopes = _Scope(0, None), 0
        self._branches, self._tables, self._location = [], [], None
        self._expect("{")
        self._body(function)
        self._resolve_labels(function)
        return function

    def _parameters(self, function: Function) -> None:
        offset = 0
        while not self._take(")"):
            self._expect(".param")
            align, size, type_name = 0, 0, ""
            while self._peek().startswith("."):
                word = self._next()
                if word == ".align":
                    align = self._integer()
                elif word in (".ptr", ".global", ".const", ".shared", ".local"):
                    continue
                else:
                    size, type_name = _type_bytes(word), word.removeprefix(".")
                    if self._peek() == ".ptr":
                        self._pointer_attributes()
            name = self._next()
            natural = size
            if self._take("["):
                size *= self._integer()
                self._expect("]")
            align = align or natural
            offset = -(-offset // align) * align
            function.parameters.append(Parameter(name, offset, size, align, type_name))
            offset += size
            self._take(",")

    def _pointer_attributes(self) -> None:
        self._expect(".ptr")
        while self._peek().startswith("."):
            if self._next() == ".align":
                self._integer()

    def _body(self, function: Function) -> None:
        while True:
            token = self._tokens[self._at]
            if token == ".loc":
                self._source_location()
            elif token == "{":
                self._at += 1
                self._scopes += 1
                self._scope = _Scope(self._scopes, self._scope)
            elif token == "}":
                self._at += 1
                if self._scope.outer is None:
                    return
                self._scope = self._scope.outer
            elif token == ";":
                self._at += 1
            elif token == _END:
                raise self._error("the body of a kernel is not closed")
            elif self._tokens[self._at + 1] == ":":
                self._label(function)
            elif token[0] == ".":
                self._body_directive(function)
            else:
                self._instruction(function)

    def _label(self, function: Function) -> None:
        line = self._lines[self._at]
        name = self._next()
        self._expect(":")
        unique = self._scope.rename(name)
        self._scope.labels[name] = unique
        if self._peek() == ".branchtargets":
            self._next()
            targets = [self._next()]
            while self._take(","):
                targets.append(self._next())
            self._expect(";")
            self._tables.append((unique, tuple(targets), self._scope))
        elif self._peek() == ".callprototype":
            self._skip_statement()
        else:
            function.body.append(Label(unique, line))

    def _body_directive(self, function: Function) -> None:
        word = self._peek()
        if word == ".reg":
            self._register_declaration(function)
        elif word in _SPACES:
            function.variables.append(self._variable(extern=False))
        elif word in (".pragma", ".param", ".callprototype"):
            self._skip_statement()
        elif word == ".file":
            self._file()
        else:
            raise self._error(f"directive {word} is not known")

    def _register_declaration(self, function: Function) -> None:
        self._expect(".reg")
        type_name = self._next().removeprefix(".")
        if type_name.startswith("v") and type_name[1:].isdigit():
            raise self._error("vector registers are not supported")
        while True:
            name = self._next()
            if self._take("<"):
                count = self._integer()
                self._expect(">")
                names = [f"{name}{k}" for k in range(count)]
            else:
                names = [name]
            for each in names:
                unique = self._scope.rename(each)
                self._scope.registers[each] = unique
                self._scope.known[each] = Register(unique)
                function.registers[unique] = type_name
            if not self._take(","):
                break
        self._expect(";")

    def _source_location(self) -> None:
        """`.loc` has no semicolon: it ends with its line."""
        start, line = self._at + 1, self._lines[self._at]
        end = start
        while self._lines[end] == line and self._tokens[end] != ";":
            end += 1
        words = self._tokens[start:end]
        if len(words) < 3 or not all(map(_is_number, words[:3])):
            raise self._error("a file, a line and a column were expected behind .loc")
        if not self._locations.is_in_inline_asm(line):
            self._location = self._locations.at(words)
        self._at = end

    def _instruction(self, function: Function) -> None:
        tokens = self._tokens
        line = self._lines[self._at]
        guard = None
        if tokens[self._at] == "@":
            self._at += 1
            negated = self._take("!")
            name = self._next()
            guard = Register(self._scope.register(name) or name, negated)
        word = tokens[self._at]
        split = self._words.get(word)
        if split is None:
            if not _is_word(word):
                raise self._error(f"{word!r} begins no instruction")
            opcode, *modifiers = word.split(".")
            split = self._words[word] = (opcode, tuple(modifiers))
        self._at += 1
        operands: list[Operand] = []
        known = self._scope.known
        while True:
            token = tokens[self._at]
            if token == ";":
                self._at += 1
                break
            operand: Operand | None = known.get(token)
            if operand is not None and tokens[self._at + 1] in (",", ";"):
                self._at += 1
            else:
                operand = self._operand()
            operands.append(operand)
            if tokens[self._at] == ",":
                self._at += 1
            elif tokens[self._at] != ";":
                raise self._error(f"';' was expected after an operand, not {tokens[self._at]!r}")
        if split[0] in _BRANCHES:
            self._branches.append((len(function.body), self._scope))
        function.body.append(Instruction(*split, tuple(operands), line, guard, self._location))

    def _resolve_labels(self, function: Function) -> None:
        for index, scope in self._branches:
            instruction = function.body[index]
            assert isinstance(instruction, Instruction)
            operands = tuple(
                Symbol(scope.label(o.name) or o.name) if isinstance(o, Symbol) else o
                for o in instruction.operands
            )
            function.body[index] = replace(instruction, operands=operands)
        for name, targets, scope in self._tables:
            function.branch_targets[name] = tuple(scope.label(t) or t for t in targets)

    # ------------------------------------------------------------------ operands

    def _operand(self) -> Operand:
        if self._take("{"):
            return Vector(self._list("}"))
        if self._take("("):
            return Vector(self._list(")"))
        if self._take("["):
            return self._address()
        if self._take("!"):
            register = self._expression()
            if not isinstance(register, Register):
                raise self._error("a predicate was expected after '!'")
            return replace(register, negated=True)
        first = self._expression()
        if self._take("|"):
            second = self._expression()
            if not isinstance(first, Register) or not isinstance(second, Register):
                raise self._error("two registers were expected around '|'")
            return Pair(first, second)
        return first

    def _list(self, end: str) -> tuple[Operand, ...]:
        elements: list[Operand] = []
        while not self._take(end):
            elements.append(self._operand())
            self._take(",")
        return tuple(elements)

    def _address(self) -> Address:
        base = self._expression()
        offset = 0
        if isinstance(base, Symbol) and base.offset:
            base, offset = Symbol(base.name), base.offset
        while self._peek() in ("+", "-"):
            sign = -1 if self._next() == "-" else 1
            offset += sign * self._integer()
        coordinates: list[Operand] = []
        while self._take(","):
            operand = self._operand()
            coordinates += operand.elements if isinstance(operand, Vector) else (operand,)
        self._expect("]")
        return Address(base, offset, tuple(coordinates))

    def _expression(self) -> Expression:
        negative = self._take("-")
        token = self._peek()
        known = self._scope.known.get(token)
        if known is not None and not negative:
            self._at += 1
            return known
        if _is_number(token):
            self._at += 1
            immediate = _immediate(token)
            return replace(immediate, value=-immediate.value) if negative else immediate
        if not _is_word(token) or negative:
            raise self._error(f"an operand was expected, not {token!r}")
        self._at += 1
        unique = self._scope.register(token)
        if unique is not None or token[0] == "%" or token == "_":
            return self._scope.known.setdefault(token, Register(unique or token))
        if token == "WARP_SZ":
            return Immediate(32)
        offset = self._integer() if self._take("+") else 0
        return Symbol(token, offset)


def _is_number(token: str) -> bool:
    return token[:1].isdigit()


def _is_word(token: str) -> bool:
    return token[:1].isalpha() or token[:1] in (".", "%", "$", "_")


def _number(text: str) -> int:
    text = text.rstrip("U")
    if len(text) > 1 and text[0] == "0" and text.isdigit():
        return int(text, 8)
    return int(text, 0)


def _immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F"):
        return Immediate(0, bits=int(text[2:], 16), bits_width=32)
    if text[:2] in ("0d", "0D"):
        return Immediate(0, bits=int(text[2:], 16), bits_width=64)
    if "." in text:
        return Immediate(float(text))
    return Immediate(_number(text))


def _type_bytes(word: str) -> int:
    digits = "".join(c for c in word if c.isdigit())
    if not digits:
        raise PtxSyntaxError(f"{word} is not a type with a size")
    return int(digits) // 8 if "x2" not in word else 4


def _literal_bytes(value: Expression, size: int) -> bytes:
    if not isinstance(value, Immediate):
        raise PtxSyntaxError("addresses in initializers are not supported")
    if value.bits is not None:
        return value.bits.to_bytes(size, "little")
    return (int(value.value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
