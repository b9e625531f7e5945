#!/usr/bin/env python3
"""Translates the PTX that nvcc emits into C++ that the SIMT emulator runs in place of the kernels' source.

    ptx2cpp.py IN.ptx OUT.cpp

A virtual register becomes a local variable of its class (.b32 and .u32 uint32_t, .f32 float ..), an instruction one
statement (ptx_instructions.py), a branch a goto; ptx.h is the run-time half. An instruction, modifier or operand that
is not known fails the translation, with a list of all of them: nothing is skipped.
"""

import re
import sys
from pathlib import Path

from ptx_instructions import SPECIAL, TYPES, Instructions, Unknown, bits, cpp_name, need, split_operands

VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*(?:=\s*\{?([^;}]*)\}?)?;"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
BRACE = re.compile(r"[{}]")
STATEMENT = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+)\s*:|(?P<debug>\.(?:loc|file)[^\n]*)|(?P<statement>[^;]+);)"
)


def round_up(value, to):
    return -(-value // to) * to


class Kernel(Instructions):
    """One .entry: the offsets of its parameters and shared arrays, its registers, its body as C++ statements."""

    def __init__(self, name, parameters, body, line, module_variables):
        self.name, self.body, self.line = name, body, line
        self.unknown = {}  # instruction: line of its first use
        self.symbols = {}  # parameter or array: (space, C++ expression of its address)
        self.scopes = [{}]  # register: PTX type, of the kernel and of each open brace
        self.used = {}  # PTX type: C++ names of the kernel's registers that occur
        self.local_arrays = []  # their declarations
        self.targets = {}  # of .branchtargets
        self.param_bytes = self.lay_out_parameters(parameters)
        self.shared_bytes = self.lay_out_arrays(module_variables)
        self.statements = list(self.translate())

    def lay_out_parameters(self, text):
        offset = 0
        for parameter in filter(None, (part.strip() for part in text.split(","))):
            type_ = next(word for word in re.findall(r"\.(\w+)", parameter) if word in TYPES)
            align = re.search(r"\.align (\d+) \.b8", parameter)  # `.ptr .align` speaks of what a pointer points to
            name, count = re.search(r"([\w$]+)(?:\[(\d+)\])?$", parameter).groups()
            offset = round_up(offset, int(align[1]) if align else bits(type_) // 8)
            self.symbols[name] = ("param", str(offset))
            offset += bits(type_) // 8 * int(count or 1)
        return offset

    def lay_out_arrays(self, module_variables):
        """Returns the bytes of the static shared arrays, behind which the dynamic array begins."""
        mentioned = set(re.findall(r"[\w$]+", self.body))
        offset, dynamic = 0, []
        for space, align, type_, name, count, _ in module_variables + VARIABLE.findall(self.body):
            if name not in mentioned or name in self.symbols:
                continue
            align = max(int(align or 1), bits(type_) // 8)
            size = bits(type_) // 8 * int(count.strip("[]") or 1)
            if space != "shared":
                self.symbols[name] = (space, f"uint64_t({cpp_name(name)})")
                if space == "local":
                    self.local_arrays.append(f"alignas({align}) unsigned char {cpp_name(name)}[{size}];")
            elif count == "[]":
                dynamic.append((name, align))
            else:
                offset = round_up(offset, align)
                self.symbols[name] = (space, str(offset))
                offset += size
        offset = round_up(offset, max((align for _, align in dynamic), default=1))
        self.symbols.update((name, ("shared", str(offset))) for name, _ in dynamic)
        return offset

    def translate(self):
        position = 0
        while match := STATEMENT.match(self.body, position):
            start = match.start(match.lastgroup)
            self.line += self.body.count("\n", position, start)
            if match["brace"]:
                self.scopes.append({}) if match["brace"] == "{" else self.scopes.pop()
                yield match["brace"]
            elif match["label"]:
                self.label = match["label"]
                yield f"{cpp_name(self.label)}:;"
            elif match["statement"]:
                yield from self.statement(match["statement"].strip())
            self.line += self.body.count("\n", start, match.end())
            position = match.end()

    def statement(self, text):
        if text.startswith(".reg"):
            yield from self.declare(text)
        elif text.startswith(".branchtargets"):
            self.targets[self.label] = split_operands(text.split(None, 1)[1])
        elif not text.startswith("."):
            guard, opcode, operands = re.match(r"(@!?%?\w+\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
            try:
                code = self.instruction(opcode, split_operands(operands))
            except (Unknown, ValueError, KeyError, IndexError) as error:
                self.unknown.setdefault(f"{opcode} ({error})" if isinstance(error, Unknown) else opcode, self.line)
                return
            if guard:
                negation, name = re.match(r"@(!?)(\S+)", guard).groups()
                code = f"if ({negation}{self.read(name, 'pred')}) {{ {code} }}"
            elif ";" in code[:-1]:
                code = f"{{ {code} }}"
            yield code

    # Registers and operands ------------------------------------------------------------------------------------------

    def declare(self, text):
        type_, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in split_operands(names):
            base, count = re.match(r"([%\w$]+)(?:<(\d+)>)?", name).groups()
            for register in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                self.scopes[-1][register] = type_
                if len(self.scopes) > 1:
                    yield f"{TYPES[type_][0]} {cpp_name(register)} = {{}};"

    def register(self, name):
        """The register's C++ name and PTX type; None for another operand."""
        for scope in reversed(self.scopes):
            if name in scope:
                if scope is self.scopes[0]:
                    self.used.setdefault(scope[name], {})[cpp_name(name)] = None
                return cpp_name(name), scope[name]
        return None

    def read(self, operand, type_):
        """The operand as a C++ expression of PTX type `type_`."""
        cpp, size, kind = TYPES[type_]
        if operand.startswith("!"):
            return "!" + self.read(operand[1:], type_)
        if register := self.register(operand):
            name, own = register
            if TYPES[own][0] == cpp or kind == "p":
                return name
            need(own != "pred" and size <= bits(own), f"operand {operand}")
            if kind in "fh" or TYPES[own][2] == "f":
                return f"ptx::as<{cpp}>({name})"
            return f"{cpp}({name})"
        if operand in SPECIAL:
            return f"{cpp}({SPECIAL[operand]})"
        if operand in self.symbols:
            return f"{cpp}({self.symbols[operand][1]})"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", operand):
            literal = f"0x{match[1]}u" if match[1] else f"0x{match[2]}ull"
            return f"ptx::as<{cpp}>({literal})"
        need(re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand), f"operand {operand}")
        value = int(operand.rstrip("U"), 0) % (1 << size)
        if kind == "p":
            return "true" if value else "false"
        literal = f"{value}u" if value < 1 << 32 else f"{value}ull"
        return f"ptx::as<{cpp}>({TYPES[f'b{size}'][0]}({literal}))" if kind in "fh" else f"{cpp}({literal})"

    def write(self, operand, type_, expression):
        """The statement that sets a register to the expression, which has PTX type `type_`."""
        if operand == "_":
            return f"(void)({expression});"
        name, own = self.register(operand) or need(False, f"result {operand}")
        cpp, size, kind = TYPES[type_]
        if TYPES[own][0] == cpp:
            return f"{name} = {expression};"
        need("pred" not in (own, type_) and size <= bits(own), f"result {operand}")
        if kind in "fh" or TYPES[own][2] == "f":
            unsigned = TYPES[f"b{size}"][0]
            value = f"{cpp}({expression})" if kind in "fh" else f"{unsigned}({expression})"
            return f"{name} = ptx::as<{TYPES[own][0] if size == bits(own) else unsigned}>({value});"
        return f"{name} = {TYPES[own][0]}({cpp}({expression}));"

    def address(self, operand, space, size=0, kind=0):
        """A pointer to what a memory operand names, after telling the emulator of the access (0 read, 1 write)."""
        base, offset = re.fullmatch(r"\[\s*([^\]+\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        need(base not in self.symbols or self.symbols[base][0] == space, f"address {operand}")
        if space == "param":
            return f"parameters + {self.read(base, 'u64')} + {offset or 0}"
        if space == "shared":
            pointer = f"shared + uint32_t({self.read(base, 'u32')} + {offset or 0})"
        else:
            pointer = f"reinterpret_cast<unsigned char*>({self.read(base, 'u64')} + {offset or 0})"
        return f"ptx::checked({pointer}, {size}, {kind}, {self.line})" if size else pointer

    def cpp(self):
        registers = (f"  {TYPES[type_][0]} {' = {}, '.join(names)} = {{}};" for type_, names in self.used.items())
        lines = (f"  {line}" for line in [*self.local_arrays, *self.statements])
        shared = "  [[maybe_unused]] auto* const shared = static_cast<unsigned char*>(simt::dynamic_shared());"
        head = f"void {self.name}_ptx([[maybe_unused]] const unsigned char* parameters) {{"
        return "\n".join([head, shared, *registers, *lines, "}"])


def without_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def split_module(text):
    """Returns what is outside of the entries, and (name, parameters, body, line of the body) of every entry."""
    outside, entries, position = "", [], 0
    while match := ENTRY.search(text, position):
        outside += text[position : match.start()]
        depth, position = 1, match.end()
        while depth:
            brace = BRACE.search(text, position)
            depth, position = depth + (1 if brace[0] == "{" else -1), brace.end()
        line = text.count("\n", 0, match.end()) + 1
        entries.append((match[1], match[2], text[match.end() : position - 1], line))
    return outside + text[position:], entries


def table(space, align, type_, name, count, values):
    """A module's .const or .global array, which kernels only read."""
    size = count.strip("[]") or "1"
    return f"alignas({align or 1}) static const {TYPES[type_][0]} {cpp_name(name)}[{size}] = {{{values}}};"


def translate(text):
    """Returns the C++ of a PTX module and what it did not know: {instruction: line}."""
    outside, entries = split_module(without_comments(text))
    module = VARIABLE.findall(outside)
    kernels = [Kernel(*entry, module) for entry in entries]
    unknown = {name: line for kernel in kernels for name, line in kernel.unknown.items()}
    records = [f'    {{"{k.name}", {k.shared_bytes}, {k.param_bytes}, {k.name}_ptx}},' for k in kernels]
    tables = [table(*variable) for variable in module if variable[0] != "shared"]
    parts = ['#include "ptx.h"\n\nnamespace {', *tables, *(kernel.cpp() for kernel in kernels)]
    parts.append("\n".join(["const ptx::Register translated{", *records, "};", "}  // namespace"]))
    return "\n\n".join(parts) + "\n", unknown


def main():
    source, target = map(Path, sys.argv[1:])
    code, unknown = translate(source.read_text())
    for name, line in unknown.items():
        print(f"{source}:{line}: not translated: {name}", file=sys.stderr)
    if unknown:
        sys.exit(1)
    target.write_text(code)


if __name__ == "__main__":
    main()
