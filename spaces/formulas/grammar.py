"""Text form of formulas: a parser for this grammar, and the canonical text.

    sum     = product {("+" | "-") product}
    product = factor {("*" | "/") factor}
    factor  = "-" factor | number | terminal | operator "(" sum {"," sum} ")" | "(" sum ")"

Operators of the same precedence group to the left. ``-2`` is a constant, ``-x`` is ``neg(x)``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from secateur.spaces.formulas.operators import ATOM, INFIX, OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import (
    GREATEST,
    LEAST,
    WIDEST,
    Apply,
    Bounds,
    Constant,
    Terminal,
    Tree,
    fold,
    is_constant,
)
from secateur.spaces.names import did_you_mean

LONGEST = 4000
"""Largest number of characters of a text."""

_NESTED = 80
_WORD = re.compile(
    r"(?P<number>[0-9]{1,40}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,4})?)|(?P<name>[A-Za-z_][A-Za-z_0-9]{0,40})|"
    r"(?P<sign>[-+*/(),])"
)
_SPACE = re.compile(r"[ \t\r\n]*")


class FormulaTextError(ValueError):
    """Error in the text of a formula, with its position.

    Args:
        message: one line.
        column: of the first character at fault, from 1.
    """

    def __init__(self, message: str, column: int) -> None:
        super().__init__(message)
        self.column = column


def parse(text: str, bounds: Bounds = WIDEST, terminals: Collection[str] = tuple(TERMINALS)) -> Tree:
    """Tree of a text, not simplified.

    Raises:
        FormulaTextError: if the text is not a formula within the bounds.
    """
    if len(text) > LONGEST:
        raise FormulaTextError(
            f"Expected a formula of at most {LONGEST} characters, got {len(text)}.", LONGEST + 1
        )
    parser = _Parser(text, terminals)
    tree = parser.sum()
    if parser.word.kind != "end":
        raise parser.expected("`+`, `-`, `*`, `/` or the end")
    if not bounds.hold(tree):
        raise FormulaTextError(
            f"Expected a formula of depth <= {bounds.depth} and size <= {bounds.size}, got depth {tree.depth} and "
            f"size {tree.size} in {_quoted(text)}.",
            1,
        )
    return tree


def print_formula(tree: Tree) -> str:
    """Canonical text; `parse` is its inverse."""
    return fold(tree, _terminal, _constant, _applied)[0]


_Printed = tuple[str, int]
"""Text and its precedence."""


def _terminal(name: str) -> _Printed:
    return name, ATOM


def _constant(value: float) -> _Printed:
    return repr(value).removesuffix(".0"), ATOM


def _applied(operator: str, arguments: Sequence[_Printed]) -> _Printed:
    row = OPERATORS[operator]
    if not row.infix:
        return f"{operator}({', '.join(text for text, _ in arguments)})", ATOM
    (left, left_binds), (right, right_binds) = arguments
    left = left if left_binds >= row.precedence else f"({left})"
    right = right if right_binds > row.precedence else f"({right})"
    return f"{left} {row.infix} {right}", row.precedence


@dataclass(frozen=True)
class _Word:
    kind: str  # number, name, sign, end
    text: str
    start: int


class _Parser:
    """Recursive descent parser; each method parses one rule of the grammar."""

    def __init__(self, text: str, terminals: Collection[str]) -> None:
        self._text = text
        self._terminals = terminals
        self._nested = 0
        self.word = self._read(0)

    def sum(self) -> Tree:
        return self._chain(1)

    def _chain(self, precedence: int) -> Tree:
        """Left-associative operators of one precedence."""
        read = self._factor if precedence == 2 else lambda: self._chain(2)
        tree = read()
        while (name := INFIX.get(self.word.text)) and OPERATORS[name].precedence == precedence:
            sign = self._next()
            tree = self._apply(name, (tree, read()), sign)
        return tree

    def _factor(self) -> Tree:
        self._nested += 1
        if self._nested > _NESTED:
            raise self._error(f"Expected at most {_NESTED} nested parentheses and signs, got more", self.word)
        tree = self._inner()
        self._nested -= 1
        return tree

    def _inner(self) -> Tree:
        word = self.word
        if word.kind == "number":
            return self._number(1)
        if word.kind == "name":
            return self._name()
        if word.text == "-":
            self._next()
            return (
                self._number(-1)
                if self.word.kind == "number"
                else self._apply("neg", (self._factor(),), word)
            )
        if word.text == "(":
            self._next()
            tree = self.sum()
            self._close()
            return tree
        raise self.expected("a number, a terminal, an operator or `(`")

    def _number(self, sign: int) -> Tree:
        word = self._next()
        value = sign * float(word.text)
        underflow = value == 0 and word.text.lower().partition("e")[0].strip("0.") != ""
        if underflow or not is_constant(value):
            raise self._error(
                f"Expected a constant that is 0 or of a magnitude within {LEAST:g} and {GREATEST:g}, "
                f"got {_quoted(word.text)}",
                word,
            )
        return Constant(value)

    def _name(self) -> Tree:
        word = self._next()
        if word.text in self._terminals:
            return Terminal(word.text)
        row = OPERATORS.get(word.text)
        if row is None:
            raise self._error(f"Expected a known name, got {word.text!r}", word, self._hint(word.text))
        if self.word.text != "(":
            raise self.expected(f"`(` after the operator {word.text}")
        self._next()
        arguments = [self.sum()]
        while self.word.text == "," and len(arguments) <= row.arity:
            self._next()
            arguments.append(self.sum())
        if len(arguments) != row.arity:
            got = f"{len(arguments)}" if len(arguments) < row.arity else "more"
            plural = "s" * (row.arity > 1)
            raise self._error(f"Expected {row.arity} argument{plural} of {word.text}, got {got}", word)
        self._close()
        return self._apply(word.text, tuple(arguments), word)

    def _close(self) -> None:
        if self.word.text != ")":
            raise self.expected("`)`")
        self._next()

    def _apply(self, operator: str, arguments: tuple[Tree, ...], word: _Word) -> Tree:
        try:
            return Apply(operator, arguments)
        except ValueError as error:
            raise self._error(str(error).rstrip("."), word) from error

    def _next(self) -> _Word:
        """The current word; advances to the next one."""
        word = self.word
        self.word = self._read(word.start + len(word.text))
        return word

    def _read(self, start: int) -> _Word:
        space = _SPACE.match(self._text, start)
        start = space.end() if space else start
        if start == len(self._text):
            return _Word("end", "", start)
        match = _WORD.match(self._text, start)
        if match is None:
            raise self._error(
                f"Expected numbers, names, + - * / ( ) and commas, got {self._text[start]!r}",
                _Word("", "", start),
            )
        return _Word(str(match.lastgroup), match.group(), start)

    def expected(self, what: str) -> FormulaTextError:
        """Error about the current word."""
        got = _quoted(self.word.text) if self.word.text else "the end"
        return self._error(f"Expected {what}, got {got}", self.word)

    def _error(self, message: str, word: _Word, hint: str = "") -> FormulaTextError:
        column = word.start + 1
        return FormulaTextError(f"{message} at column {column} of {_quoted(self._text)}.{hint}", column)

    def _hint(self, name: str) -> str:
        calls = [each for each, row in OPERATORS.items() if not row.infix]
        question = did_you_mean(name, (*self._terminals, *calls))
        return f"{question} Known: {' '.join(self._terminals)}; {' '.join(calls)}."


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
