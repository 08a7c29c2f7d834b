"""Reading Triton IR: the generic text form of MLIR into plain objects.

Triton's Python bindings give neither every attribute nor the blocks of a region, so the text is read instead. The
generic form has one grammar for all operations and versions; :func:`generic_text` gets it from a stock Triton.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tilewright.cpu.ttir import UNKNOWN, Bits, Block, Dense, Location, Module, Operation, Region, Value
from tilewright.cpu.types import parse_type

if TYPE_CHECKING:
    from tilewright.cpu.types import Type


def generic_text(module: Any) -> str:
    """The generic form of a Triton module's text.

    An attribute without a dialect's prefix makes MLIR's verifier object, and its printer then falls back to the generic
    form. The attribute stays, so this is for the last stage that needs the module.

    Raises:
        RuntimeError: this Triton's printer does not do so.
    """
    from triton._C.libtriton import ir

    module.set_attr("tilewright_generic", ir.builder(module.context).get_bool_attr(True))
    text: str = module.str()
    if '"builtin.module"' not in text:
        raise RuntimeError("this version of Triton does not print MLIR's generic form, which the CPU target reads")
    return text


def read(text: str) -> Module:
    """Read the generic text of a module."""
    return _Reader(text).module()


_TOKEN = re.compile(
    r"""\s*(?://[^\n]*\n\s*)*(?:
      (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<arrow>->)
    | (?P<value>%[A-Za-z0-9_$.\-]+(?:\#\d+)?)
    | (?P<block>\^[A-Za-z0-9_$.\-]+)
    | (?P<symbol>@(?:"(?:[^"\\]|\\.)*"|[A-Za-z0-9_$.\-]+))
    | (?P<number>-?(?:0x[0-9A-Fa-f]+|\d+(?:\.\d*(?:[eE][-+]?\d+)?)?))
    | (?P<word>[A-Za-z_][A-Za-z0-9_$.]*)
    | (?P<hash>\#[A-Za-z0-9_$.]+)
    | (?P<bang>![A-Za-z0-9_$.]+)
    | (?P<punct>[][(){}<>,:=?*+\-])
    )""",
    re.VERBOSE,
)


class _Reader:
    """A recursive descent over the tokens. Types are cut out of the text and given to ``parse_type``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [
            (m.lastgroup or "", m.group(m.lastgroup or 0), m.start(m.lastgroup or 0)) for m in self._lex(text)
        ]
        self.tokens.append(("end", "", len(text)))
        self.at = 0
        self.values: list[dict[str, list[Value]]] = [{}]
        self.locations: dict[str, Any] = {}
        self.located: list[tuple[Operation, Any]] = []
        self.successors: dict[Operation, list[str]] = {}

    @staticmethod
    def _lex(text: str) -> list[re.Match[str]]:
        found = []
        position = 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                if text[position:].strip().startswith("//"):
                    break
                raise ValueError(f"cannot read Triton IR at: {text[position : position + 60]!r}")
            found.append(match)
            position = match.end()
        return found

    # Tokens

    def peek(self, offset: int = 0) -> str:
        return self.tokens[self.at + offset][1]

    def kind(self, offset: int = 0) -> str:
        return self.tokens[self.at + offset][0]

    def next(self) -> str:
        token = self.tokens[self.at][1]
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.peek() != token:
            start = self.tokens[self.at][2]
            raise ValueError(f"cannot read Triton IR: expected {token!r} at: {self.text[start : start + 60]!r}")
        self.at += 1

    def accept(self, token: str) -> bool:
        if self.peek() == token:
            self.at += 1
            return True
        return False

    # Structure

    def module(self) -> Module:
        self._aliases()
        operation = self._operation()
        self._aliases()
        functions = {}
        for function in operation.regions[0].block.operations:
            functions[function.attributes["sym_name"]] = function
        self._resolve()
        return Module(functions, operation.attributes)

    def _aliases(self) -> None:
        while self.kind() == "hash":
            name = self.next()
            self.expect("=")
            if self.peek() == "loc":
                self.locations[name] = self._location()
            else:
                self._skip_attribute()

    def _operation(self) -> Operation:
        names: list[tuple[str, int]] = []
        if self.kind() == "value":
            while True:
                name = self.next()
                count = 1
                if self.accept(":"):
                    count = int(self.next())
                names.append((name, count))
                if not self.accept(","):
                    break
            self.expect("=")
        name = _unquote(self.next())
        self.expect("(")
        operands = self._value_list(")")
        successors: list[str] = []
        if self.accept("["):
            while not self.accept("]"):
                successors.append(self.next())
                self.accept(",")
        attributes: dict[str, Any] = {}
        if self.peek() == "<" and self.peek(1) == "{":
            self.next()
            attributes |= self._dictionary()
            self.expect(">")
        regions: list[Region] = []
        if self.peek() == "(":
            self.next()
            while True:
                regions.append(self._region())
                if not self.accept(","):
                    break
            self.expect(")")
        if self.peek() == "{":
            attributes |= self._dictionary()
        self.expect(":")
        result_types = self._function_type()
        location = self._location() if self.peek() == "loc" else ("unknown",)
        operation = Operation(name, operands, [], attributes, regions, [], UNKNOWN)
        self.successors[operation] = successors
        self.located.append((operation, location))
        index = 0
        for result_name, count in names:
            group = []
            for k in range(count):
                text = result_name[1:] if count == 1 else f"{result_name[1:]}_{k}"
                group.append(Value(result_types[index], text, operation, index))
                index += 1
            self._define(result_name, group)
            operation.results.extend(group)
        if not names:
            operation.results = [
                Value(t, f"unnamed_{id(operation)}_{k}", operation, k) for k, t in enumerate(result_types)
            ]
        return operation

    def _region(self) -> Region:
        self.expect("{")
        self.values.append({})
        blocks: list[Block] = []
        if self.kind() != "block" and self.peek() != "}":
            blocks.append(Block(""))
        while not self.accept("}"):
            if self.kind() == "block":
                block = Block(self.next())
                if self.accept("("):
                    while not self.accept(")"):
                        name = self.next()
                        self.expect(":")
                        value = Value(self._type(), name[1:], block, len(block.arguments))
                        if self.peek() == "loc":
                            self._location()
                        self._define(name, [value])
                        block.arguments.append(value)
                        self.accept(",")
                self.expect(":")
                blocks.append(block)
            else:
                blocks[-1].operations.append(self._operation())
        self.values.pop()
        by_label = {block.label: block for block in blocks}
        for block in blocks:
            for operation in block.operations:
                operation.successors = [by_label[label] for label in self.successors[operation]]
        return Region(blocks)

    def _define(self, name: str, group: list[Value]) -> None:
        self.values[-1][name] = group

    def _value(self, token: str) -> Value:
        name, _, number = token.partition("#")
        for scope in reversed(self.values):
            if name in scope:
                return scope[name][int(number or 0)]
        # Blocks may be printed in an order in which a use stands before the definition.
        raise ValueError(f"cannot read Triton IR: {token} is used before it is defined")

    def _value_list(self, end: str) -> list[Value]:
        values = []
        while not self.accept(end):
            values.append(self._value(self.next()))
            self.accept(",")
        return values

    # Types

    def _function_type(self) -> list[Type]:
        self.expect("(")
        while not self.accept(")"):
            self._type()
            self.accept(",")
        self.expect("->")
        if not self.accept("("):
            return [self._type()]
        types = []
        while not self.accept(")"):
            types.append(self._type())
            self.accept(",")
        return types

    def _type(self) -> Type:
        start = self.at
        self.next()
        if self.peek() == "<":
            self._skip_brackets()
        return parse_type(self._span(start))

    def _skip_brackets(self) -> None:
        pairs = {"<": ">", "(": ")", "{": "}", "[": "]"}
        stack = [pairs[self.next()]]
        while stack:
            token = self.next()
            if token in pairs:
                stack.append(pairs[token])
            elif token == stack[-1]:
                stack.pop()

    def _span(self, start: int) -> str:
        first = self.tokens[start][2]
        last = self.tokens[self.at - 1]
        return self.text[first : last[2] + len(last[1])]

    # Attributes

    def _dictionary(self) -> dict[str, Any]:
        self.expect("{")
        found: dict[str, Any] = {}
        while not self.accept("}"):
            key = self.next()
            if self.kind(-1) == "string":
                key = _unquote(key)
            found[key] = self._attribute() if self.accept("=") else True
            self.accept(",")
        return found

    def _attribute(self) -> Any:
        kind, token = self.kind(), self.peek()
        if token == "{":
            return self._dictionary()
        if token == "[":
            self.next()
            items = []
            while not self.accept("]"):
                items.append(self._attribute())
                self.accept(",")
            return items
        if token == "dense":
            return self._dense()
        if token == "array":
            return self._array()
        if kind == "string":
            self.next()
            text = _unquote(token)
            if self.accept(":"):
                self._type()
            return text
        if kind == "symbol":
            return self.next()[1:].strip('"')
        if token in {"true", "false"}:
            self.next()
            return token == "true"
        if kind == "number":
            self.next()
            type_ = self._type() if self.accept(":") else None
            return _number(token, type_)
        if token == "loc":
            return self._location()
        start = self.at
        self._skip_attribute()
        return self._span(start)

    def _skip_attribute(self) -> None:
        """Pass over an attribute that nothing here reads, such as a type or ``#arith.overflow<none>``."""
        if self.peek() in {"(", "{", "["}:
            self._skip_brackets()
        else:
            self.next()
        while True:
            if self.peek() == "<":
                self._skip_brackets()
            elif self.peek() == "->":
                self.next()
                self._skip_attribute()
            else:
                return

    def _array(self) -> list[Any]:
        self.expect("array")
        self.expect("<")
        self.next()
        items: list[Any] = []
        if self.accept(":"):
            while self.peek() != ">":
                token = self.next()
                items.append(token == "true" if token in {"true", "false"} else _number(token, None))
                self.accept(",")
        self.expect(">")
        return items

    def _dense(self) -> Dense:
        self.expect("dense")
        self.expect("<")
        raw: list[str] = []
        splat = self.peek() != "["
        while self.peek() != ">":
            token = self.next()
            if token not in {"[", "]", ","}:
                raw.append(token)
        self.expect(">")
        self.expect(":")
        type_ = self._type()
        element = getattr(type_, "element", None)
        if raw and raw[0].startswith('"0x'):
            return Dense(_hex_elements(raw[0][3:-1], element), False)
        values = [_number(token, element) for token in raw]
        return Dense(values[0] if splat and values else values, splat)

    # Locations

    def _location(self) -> Any:
        """A location as nested tuples; aliases are resolved when everything has been read."""
        self.expect("loc")
        self.expect("(")
        found = self._location_body()
        self.expect(")")
        return found

    def _location_body(self) -> Any:
        if self.kind() == "hash":
            return ("alias", self.next())
        if self.kind() == "string":
            text = _unquote(self.next())
            if self.accept(":"):
                line = int(self.next())
                self.expect(":")
                column = int(self.next())
                if self.peek() == "to":  # a range: the start is enough
                    while self.peek() != ")":
                        self.next()
                return ("file", text, line, column)
            if self.accept("("):
                inner = self._location_body()
                self.expect(")")
                return ("name", text, inner)
            return ("name", text, ("unknown",))
        word = self.next()
        if word == "callsite":
            self.expect("(")
            callee = self._location_body()
            self.expect("at")
            caller = self._location_body()
            self.expect(")")
            return ("callsite", callee, caller)
        if word == "fused":
            if self.peek() == "<":
                self._skip_brackets()
            self.expect("[")
            parts = []
            while not self.accept("]"):
                parts.append(self._location_body())
                self.accept(",")
            return ("fused", parts)
        return ("unknown",)

    def _resolve(self) -> None:
        """Give every operation its location, now that all aliases have been read."""
        cache: dict[str, Location] = {}

        def resolve(raw: Any) -> Location:
            kind = raw[0]
            if kind == "alias":
                if raw[1] not in cache:
                    cache[raw[1]] = UNKNOWN
                    cache[raw[1]] = resolve(self.locations.get(raw[1], ("unknown",)))
                return cache[raw[1]]
            if kind == "file":
                return Location(raw[1], raw[2], raw[3])
            if kind == "name":
                inner = resolve(raw[2])
                return Location(inner.file, inner.line, inner.column, raw[1], inner.callers)
            if kind == "callsite":
                callee, caller = resolve(raw[1]), resolve(raw[2])
                return Location(
                    callee.file, callee.line, callee.column, callee.name, (*callee.callers, *caller.frames())
                )
            if kind == "fused":
                parts = [resolve(part) for part in raw[1]]
                return next((part for part in parts if part.line), UNKNOWN)
            return UNKNOWN

        for operation, raw in self.located:
            operation.location = resolve(raw)


def _unquote(text: str) -> str:
    """The string between the quotes, MLIR's escapes undone."""
    escapes = {"n": "\n", "t": "\t", "\\": "\\", '"': '"'}

    def one(match: re.Match[str]) -> str:
        body = match.group(1)
        return escapes[body] if body in escapes else chr(int(body, 16))

    return re.sub(r'\\([nt\\"]|[0-9A-Fa-f]{2})', one, text[1:-1])


def _number(token: str, type_: Any) -> Any:
    """A number: floats given as hexadecimal are bit patterns, and come back as :class:`Bits`."""
    if token in {"true", "false"}:
        return token == "true"
    is_float = getattr(type_, "is_float", False)
    if token.lstrip("-").startswith("0x"):
        value = int(token, 16)
        return Bits(value, type_) if is_float else value
    if "." in token or "e" in token.lower() or is_float:
        return float(token)
    return int(token)


def _hex_elements(text: str, element: Any) -> list[Any]:
    """The elements of a dense constant that is printed as one hexadecimal blob, little endian."""
    data = bytes.fromhex(text)
    size = element.bytes
    patterns = [int.from_bytes(data[k : k + size], "little") for k in range(0, len(data), size)]
    return [Bits(p, element) for p in patterns] if element.is_float else patterns
