"""The PTX instructions that ptx2cpp.py knows, as C++.

Arithmetic comes from the tables; what needs more (memory, conversions, warp operations) has a method. Approximate
instructions (rsqrt.approx, ex2.approx ..) compute the exactly rounded value, so a test's bounds must allow either.
Float atomics, whose sums depend on the schedule, are not known on purpose.
"""

import re

# PTX type: C++ type, bits, kind (p predicate, b bits, u unsigned, s signed, f float, h float kept in 16 bits).
TYPES = {
    "pred": ("bool", 1, "p"),
    "f32": ("float", 32, "f"),
    "f64": ("double", 64, "f"),
    "f16": ("__half", 16, "h"),
    "bf16": ("__nv_bfloat16", 16, "h"),
    "f16x2": ("__half2", 32, "h"),
    "bf16x2": ("__nv_bfloat162", 32, "h"),
    "b128": ("ptx::b128", 128, "b"),
    **{f"b{n}": (f"uint{n}_t", n, "b") for n in (8, 16, 32, 64)},
    **{f"u{n}": (f"uint{n}_t", n, "u") for n in (8, 16, 32, 64)},
    **{f"s{n}": (f"int{n}_t", n, "s") for n in (8, 16, 32, 64)},
}
SPECIAL = {
    **{
        f"%{name}.{axis}": f"{variable}.{axis}"
        for name, variable in (("tid", "threadIdx"), ("ntid", "blockDim"), ("ctaid", "blockIdx"), ("nctaid", "gridDim"))
        for axis in "xyz"
    },
    "%laneid": "simt::lane_id()",
    "%lanemask_eq": "(1u << simt::lane_id())",
    "%lanemask_lt": "((1u << simt::lane_id()) - 1)",
    "%lanemask_le": "((2u << simt::lane_id()) - 1)",
    "%lanemask_gt": "~((2u << simt::lane_id()) - 1)",
    "%lanemask_ge": "~((1u << simt::lane_id()) - 1)",
}

# Opcode less its type: expression, and the operands' types. t: the instruction's type; u: the same, unsigned, where C++
# leaves signed overflow undefined; w: unsigned, twice as wide; i: u32; p: predicate. After '>' the
# result's type, t if not given.
INTEGER = {
    "add": ("{} + {}", "uu>u"),
    "sub": ("{} - {}", "uu>u"),
    "neg": ("0 - {}", "u>u"),
    "mul.lo": ("1u * {} * {}", "uu>u"),  # 1u: uint16_t would multiply as int
    "mul.hi": ("ptx::mul_hi({}, {})", "tt"),
    "mul.wide": ("ptx::mul_wide({}, {})", "tt>w"),
    "mad.lo": ("1u * {} * {} + {}", "uuu>u"),
    "mad.hi": ("ptx::mul_hi({}, {}) + {}", "ttu>u"),
    "mad.wide": ("ptx::mul_wide({}, {}) + {}", "ttw>w"),
    "div": ("ptx::div({}, {})", "tt"),
    "rem": ("ptx::rem({}, {})", "tt"),
    "abs": ("ptx::abs({})", "t"),
    "min": ("std::min({}, {})", "tt"),
    "max": ("std::max({}, {})", "tt"),
    "and": ("{} & {}", "tt"),
    "or": ("{} | {}", "tt"),
    "xor": ("{} ^ {}", "tt"),
    "not": ("~{}", "t"),
    "cnot": ("{} == 0", "t"),
    "shl": ("ptx::shl({}, {})", "ti"),
    "shr": ("ptx::shr({}, {})", "ti"),
    "shf.l.wrap": ("ptx::shf_l({}, {}, {} & 31)", "tti"),
    "shf.r.wrap": ("ptx::shf_r({}, {}, {} & 31)", "tti"),
    "shf.l.clamp": ("ptx::shf_l({}, {}, std::min({}, 32u))", "tti"),
    "shf.r.clamp": ("ptx::shf_r({}, {}, std::min({}, 32u))", "tti"),
    "popc": ("__builtin_popcountll({})", "t>i"),
    "clz": ("ptx::clz({})", "t>i"),
    "brev": ("ptx::brev({})", "t"),
    "bfind": ("ptx::bfind({})", "t>i"),
    "bfind.shiftamt": ("ptx::bfind_shift({})", "t>i"),
    "bfe": ("ptx::bfe({}, {}, {})", "tii"),
    "bfi": ("ptx::bfi({}, {}, {}, {})", "ttii"),
    "lop3": ("ptx::lop3({}, {}, {}, {})", "ttti"),
    "prmt": ("ptx::prmt({}, {}, {})", "tti"),
    "selp": ("{2} ? {0} : {1}", "ttp"),
}
PREDICATE = {"and": ("{} && {}", "tt"), "or": ("{} || {}", "tt"), "xor": ("{} != {}", "tt"), "not": ("!{}", "t")}
# The same names for f16 and bf16 and their pairs, which ptx::lift computes as double and rounds once.
FLOAT = {
    "add": ("{} + {}", "tt"),
    "sub": ("{} - {}", "tt"),
    "mul": ("{} * {}", "tt"),
    "div": ("{} / {}", "tt"),
    "fma": ("std::fma({}, {}, {})", "ttt"),
    "neg": ("-{}", "t"),
    "abs": ("std::fabs({})", "t"),
    "min": ("ptx::min({}, {})", "tt"),
    "max": ("ptx::max({}, {})", "tt"),
    "min.NaN": ("ptx::min_nan({}, {})", "tt"),
    "max.NaN": ("ptx::max_nan({}, {})", "tt"),
    "sqrt": ("std::sqrt({})", "t"),
    "rsqrt": ("1 / std::sqrt({})", "t"),
    "rcp": ("1 / {}", "t"),
    "ex2": ("std::exp2({})", "t"),
    "lg2": ("std::log2({})", "t"),
    "sin": ("std::sin({})", "t"),
    "cos": ("std::cos({})", "t"),
    "tanh": ("std::tanh({})", "t"),
    "copysign": ("std::copysign({1}, {0})", "tt"),
    "testp.finite": ("std::isfinite({})", "t>p"),
    "testp.infinite": ("std::isinf({})", "t>p"),
    "testp.number": ("!std::isnan({})", "t>p"),
    "testp.notanumber": ("std::isnan({})", "t>p"),
    "testp.normal": ("std::isnormal({})", "t>p"),
    "testp.subnormal": ("(std::fpclassify({}) == FP_SUBNORMAL)", "t>p"),
    "selp": ("{2} ? {0} : {1}", "ttp"),
}
ROUNDING = {"rn", "approx", "full"}  # of float arithmetic: all are computed rounded to nearest
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # of unsigned integers
TO_INTEGER = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
# Where a load, store or copy is cached; it does not change what the emulator does.
CACHE = re.compile(r"nc|ca|cg|cs|cv|lu|wb|wt|volatile|weak|L1|L2|no_allocate|evict_\w+|(64|128|256)B")
ATOMICS = {
    **{name: f"atomic{name.capitalize()}" for name in ("add", "min", "max", "and", "or", "inc")},
    "xor": "ptx::atomic_xor",
    "exch": "atomicExch",
    "cas": "atomicCAS",
}
SPACES = ("param", "global", "shared", "local", "const")


class Unknown(Exception):
    """Names what the translator does not know."""


def need(condition, what):
    if not condition:
        raise Unknown(what)


def split_operands(text):
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def elements(operand):
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def cpp_name(name):
    return name.replace("%", "").replace("$", "_") + "_"


def bits(type_):
    return TYPES[type_][1]


def resized(type_, kind, factor=1):
    """The integer type of `kind` that has `factor` times the bits."""
    return f"{kind}{bits(type_) * factor}"


class Instructions:
    """The statements of instructions: instruction(opcode, operands). A subclass has read, write, address, targets, line
    and body of the kernel that they belong to."""

    def instruction(self, opcode, operands):
        root, *modifiers = filter(None, re.split(r"[.:]+", opcode))
        if method := getattr(self, f"do_{root}", None):
            return method(modifiers, operands)
        types = [modifier for modifier in modifiers if modifier in TYPES]
        need(len(types) == 1 and modifiers[-1] == types[0], "form")
        return self.arithmetic(root, modifiers[:-1], types[0], operands)

    def arithmetic(self, root, modifiers, type_, operands):
        kind = TYPES[type_][2]
        table = PREDICATE if kind == "p" else FLOAT if kind in "fh" else INTEGER
        if kind in "fh":
            modifiers = [m for m in modifiers if m not in ROUNDING and not (m == "ftz" and type_ == "f64")]
        expression, signature = table[".".join([root, *modifiers])]
        kinds, _, result = signature.partition(">")
        need(len(operands) == len(kinds) + 1, "operands")
        as_type = {"t": type_, "i": "u32", "p": "pred"}
        if kind in "bus":
            as_type |= {"u": resized(type_, "u")} | ({"w": resized(type_, "u", 2)} if bits(type_) < 64 else {})
        arguments = [self.read(operand, as_type[k]) for operand, k in zip(operands[1:], kinds, strict=True)]
        if kind == "h" and root not in ("selp", "neg", "abs"):
            names = [f"x{i}" for i in range(len(arguments))]
            function = f"[]({', '.join(f'double {name}' for name in names)}) {{ return {expression.format(*names)}; }}"
            code = f"ptx::lift({function}, {', '.join(arguments)})"
        else:
            code = expression.format(*arguments)
        return self.write(operands[0], as_type[result or "t"], code)

    def do_mov(self, modifiers, operands):
        (type_,) = modifiers
        target, source = operands
        parts = elements(target if target.startswith("{") else source)
        if len(parts) == 1:
            return self.write(target, type_, self.read(source, type_))
        part = f"b{bits(type_) // len(parts)}"
        if target.startswith("{"):
            shifted = ((name, f"whole >> {i * bits(part)}") for i, name in enumerate(parts))
            writes = " ".join(self.write(name, part, f"{TYPES[part][0]}({value})") for name, value in shifted)
            return f"const auto whole = {self.read(source, resized(type_, 'b'))}; {writes}"
        whole = TYPES[resized(type_, "b")][0]
        pieces = (f"{whole}({self.read(name, part)}) << {i * bits(part)}" for i, name in enumerate(parts))
        return self.write(target, resized(type_, "b"), " | ".join(pieces))

    def do_ld(self, modifiers, operands):
        return self.memory(modifiers, operands[0], operands[1], 0)

    def do_st(self, modifiers, operands):
        return self.memory(modifiers, operands[1], operands[0], 1)

    def memory(self, modifiers, value, address, kind):
        type_, space = modifiers[-1], next((m for m in modifiers if m in SPACES), "generic")
        registers = elements(value)
        other = [m for m in modifiers[:-1] if m != space and not CACHE.fullmatch(m)]
        need(other == ([f"v{len(registers)}"] if len(registers) > 1 else []), "form")
        size = bits(type_) // 8
        at = [f"at + {i * size}" for i in range(len(registers))]
        if kind:
            moves = (f"ptx::store({at[i]}, {self.read(name, type_)});" for i, name in enumerate(registers))
        else:
            loads = [f"ptx::load<{TYPES[type_][0]}>({place})" for place in at]
            moves = (self.write(name, type_, load) for name, load in zip(registers, loads, strict=True))
        return f"auto* at = {self.address(address, space, size * len(registers), kind)}; {' '.join(moves)}"

    def do_cvta(self, modifiers, operands):
        to, space, type_ = ("to" in modifiers, *[m for m in modifiers if m != "to"])
        need(type_ == "u64" and space in SPACES, "form")
        value = self.read(operands[1], type_)
        if space == "shared":
            value += f" {'-' if to else '+'} reinterpret_cast<uint64_t>(shared)"
        return self.write(operands[0], type_, value)

    def do_cvt(self, modifiers, operands):
        *how, to, source = modifiers
        cpp, _, to_kind = TYPES.get(to, ("", 0, ""))
        if to == "tf32":
            need(how == ["rna"], "rounding")
            return self.write(operands[0], "b32", f"simt::to_tf32({self.read(operands[1], 'b32')})")
        if to in ("f16x2", "bf16x2"):
            need(how == ["rn"] and source == "f32", "form")
            high, low = (self.read(operand, source) for operand in operands[1:])
            return self.write(operands[0], to, f"ptx::pack<{cpp}>({low}, {high})")
        value, kind = self.read(operands[1], source), TYPES[source][2]
        if kind == "h":
            value, kind = f"ptx::widen({value})", "f"
        if to_kind == "h":
            need(how in (["rn"], []), "rounding")
            return self.write(operands[0], to, f"ptx::round<{cpp}>({value})")
        if to_kind == "f":
            if how and how[0] in TO_INTEGER and kind == "f":
                value = f"{TO_INTEGER[how.pop(0)]}({value})"
            if how == ["sat"]:
                value, how = f"ptx::saturate({value})", []
            need(how in (["rn"], []), "rounding")
            return self.write(operands[0], to, f"{cpp}({value})")
        if kind == "f":
            need(len(how) == 1, "rounding")
            return self.write(operands[0], to, f"ptx::clamp<{cpp}>({TO_INTEGER[how[0]]}({value}))")
        need(how in (["sat"], []), "form")
        return self.write(operands[0], to, f"ptx::clamp<{cpp}>({value})" if how else f"{cpp}({value})")

    def do_setp(self, modifiers, operands):
        """setp.CMP[.BOOL].type p[|q], a, b[, c]: p = CMP(a, b) BOOL c, q = !CMP(a, b) BOOL c."""
        (compare, *combine), type_ = modifiers[:-1], modifiers[-1]
        a, b = self.read(operands[1], type_), self.read(operands[2], type_)
        if TYPES[type_][2] == "h":
            a, b = f"ptx::widen({a})", f"ptx::widen({b})"
        if compare in ("num", "nan"):
            result = f"{'!' if compare == 'num' else ''}(std::isnan({a}) || std::isnan({b}))"
        elif compare[-1] == "u" and compare[:-1] in COMPARE:
            result = f"({a} {COMPARE[compare[:-1]]} {b} || std::isnan({a}) || std::isnan({b}))"
        else:
            result = f"({a} {COMPARE[compare]} {b})"
            if compare == "ne" and TYPES[type_][2] in "fh":
                result = f"({a} < {b} || {a} > {b})"
        targets = operands[0].split("|")
        need(len(combine) == (len(operands) == 4), "form")
        values = ["compared", "!compared"][: len(targets)]
        code = f"const bool compared = {result}; "
        if combine:
            code += f"const bool other = {self.read(operands[3], 'pred')}; "
            values = [PREDICATE[combine[0]][0].format(value, "other") for value in values]
        elif len(targets) == 1:
            return self.write(targets[0], "pred", result)
        return code + " ".join(self.write(*item) for item in zip(targets, ["pred"] * 2, values, strict=False))

    def do_slct(self, modifiers, operands):
        type_, by = modifiers
        a, b, c = self.read(operands[1], type_), self.read(operands[2], type_), self.read(operands[3], by)
        return self.write(operands[0], type_, f"{c} >= 0 ? {a} : {b}")

    # Control ---------------------------------------------------------------------------------------------------------

    def do_bra(self, modifiers, operands):
        return f"goto {cpp_name(operands[0])};"

    def do_brx(self, modifiers, operands):
        cases = enumerate(self.targets[operands[1]])
        jumps = " ".join(f"case {i}: goto {cpp_name(label)};" for i, label in cases)
        return f"switch ({self.read(operands[0], 'u32')}) {{ {jumps} }}"

    def do_ret(self, modifiers, operands):
        return "return;"

    do_exit = do_ret

    def do_trap(self, modifiers, operands):
        return f'simt::report("trap", "PTX line {self.line}"); return;'

    def do_bar(self, modifiers, operands):
        if modifiers == ["warp", "sync"]:
            return f"__syncwarp({self.read(operands[0], 'u32')}, {self.line});"
        modifiers = [m for m in modifiers if m not in ("cta", "aligned")]
        identifier = operands[1] if modifiers[0] == "red" else operands[0]
        need(identifier == "0", "named barrier")
        if modifiers == ["sync"]:
            need(len(operands) == 1, "partial barrier")
            return f"__syncthreads({self.line});"
        need(len(operands) == 3, "partial barrier")
        _, function, type_ = modifiers
        name = {"popc": "count", "and": "and", "or": "or"}[function]
        return self.write(operands[0], type_, f"__syncthreads_{name}({self.read(operands[2], 'pred')}, {self.line})")

    do_barrier = do_bar

    def do_membar(self, modifiers, operands):
        return "__threadfence_block();" if "cta" in modifiers else "__threadfence();"

    do_fence = do_membar

    def do_nothing(self, modifiers, operands):
        return ";"

    do_prefetch = do_griddepcontrol = do_nothing

    # Between lanes ---------------------------------------------------------------------------------------------------

    def do_shfl(self, modifiers, operands):
        need(modifiers[0] == "sync" and modifiers[2] == "b32", "form")
        target, _, valid = operands[0].partition("|")
        need(not valid or len(re.findall(rf"{re.escape(valid)}\b", self.body)) == 1, "shuffle whose predicate is read")
        value, lane, clamp, mask = (self.read(operand, "u32") for operand in operands[1:])
        name = {"idx": "", "up": "_up", "down": "_down", "bfly": "_xor"}[modifiers[1]]
        width = f"int(32 - ({clamp} >> 8 & 31))"
        return self.write(target, "u32", f"__shfl{name}_sync({mask}, {value}, {lane}, {width}, {self.line})")

    def do_vote(self, modifiers, operands):
        _, function, type_ = modifiers
        call = f"__{function}_sync({self.read(operands[2], 'u32')}, {self.read(operands[1], 'pred')}, {self.line})"
        return self.write(operands[0], type_, call)

    def do_match(self, modifiers, operands):
        function, _, type_ = modifiers
        need(function == "any", "form")
        value, mask = self.read(operands[1], type_), self.read(operands[2], "u32")
        return self.write(operands[0], "u32", f"__match_any_sync({mask}, {value}, {self.line})")

    def do_redux(self, modifiers, operands):
        _, function, type_ = modifiers
        need(function == "add" or type_ != "s32", "signed reduction")
        value, mask = self.read(operands[1], type_), self.read(operands[2], "u32")
        return self.write(operands[0], type_, f"__reduce_{function}_sync({mask}, {value}, {self.line})")

    def do_activemask(self, modifiers, operands):
        return self.write(operands[0], "u32", "__activemask()")

    def do_ldmatrix(self, modifiers, operands):
        trans = "trans" in modifiers
        kept = [m for m in modifiers if m != "trans"]
        need(kept == ["sync", "aligned", "m8n8", "x4", "shared", "b16"], "form")
        row = self.address(operands[1], "shared")
        writes = " ".join(self.write(name, "b32", f"rows[{i}]") for i, name in enumerate(elements(operands[0])))
        return f"uint32_t rows[4]; simt::ldmatrix(rows, {row}, {int(trans)}, {self.line}); {writes}"

    def do_mma(self, modifiers, operands):
        form = ".".join(modifiers)
        function = {
            "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "mma_bf16",
            "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "mma_f16",
            "sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "mma_tf32",
        }.get(form)
        need(function, "form")
        d, a, b, c = map(elements, operands)
        a, b = (", ".join(self.read(name, "b32") for name in part) for part in (a, b))
        c = ", ".join(self.read(name, "f32") for name in c)
        writes = " ".join(self.write(name, "f32", f"d[{i}]") for i, name in enumerate(d))
        return (
            f"const uint32_t a[] = {{{a}}}, b[] = {{{b}}}; float d[] = {{{c}}}; "
            f"simt::{function}(d, a, b, {self.line}); {writes}"
        )

    # Memory of several threads ---------------------------------------------------------------------------------------

    def do_atom(self, modifiers, operands):
        return self.atomic(modifiers, operands[0], *operands[1:])

    def do_red(self, modifiers, operands):
        return self.atomic(modifiers, "_", *operands)

    def atomic(self, modifiers, target, address, *values):
        type_, space = modifiers[-1], next((m for m in modifiers if m in SPACES), "generic")
        function = next((m for m in modifiers if m in ATOMICS), None)
        rest = {*modifiers} - {type_, space, function, "gpu", "cta", "sys", "relaxed", "acquire", "release", "acq_rel"}
        need(function and not rest and TYPES[type_][2] in "bus", "form")
        cpp = TYPES[type_][0]
        arguments = ", ".join(self.read(value, type_) for value in values)
        call = f"{ATOMICS[function]}(reinterpret_cast<{cpp}*>({self.address(address, space)}), {arguments})"
        return self.write(target, type_, call)

    def do_cp(self, modifiers, operands):
        form = ".".join(m for m in modifiers if not CACHE.fullmatch(m))
        if form == "async.commit_group":
            return "simt::cp_async_commit();"
        if form in ("async.wait_group", "async.wait_all"):
            return f"simt::cp_async_wait({operands[0] if operands else 0});"
        need(form == "async.shared.global" and len(operands) in (3, 4), "form")
        size, source_size = operands[2], operands[-1]
        target, source = self.address(operands[0], "shared"), self.address(operands[1], "global")
        return f"simt::cp_async({target}, {source}, {size}, {self.read(source_size, 'u32')}, {self.line});"
