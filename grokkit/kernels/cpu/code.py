"""Writing kernels in LLVM's intermediate representation: integers with Python's operators, loops."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


class Int:
    """A 64-bit integer that a kernel computes, or an address. Operators write its instructions."""

    def __init__(self, code: "Code", value: Any) -> None:
        self.code = code
        self.value = I64(value) if isinstance(value, int) else value

    def _of(self, operation: str, other: Any) -> "Int":
        right = self.code.integer(other).value
        return Int(self.code, getattr(self.code.builder, operation)(self.value, right))

    def __add__(self, other: Any) -> "Int":
        return self._of("add", other)

    def __sub__(self, other: Any) -> "Int":
        return self._of("sub", other)

    def __mul__(self, other: Any) -> "Int":
        return self._of("mul", other)

    def __floordiv__(self, other: Any) -> "Int":
        """Of numbers that are not negative."""
        return self._of("udiv", other)

    def __lt__(self, other: Any) -> Any:
        return self.code.builder.icmp_signed("<", self.value, self.code.integer(other).value)

    def __eq__(self, other: object) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.code.builder.icmp_signed("==", self.value, self.code.integer(other).value)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Code:
    """Writes one function's instructions."""

    def __init__(
        self, module: ir.Module, name: str, n_arguments: int, is_public: bool = False
    ) -> None:
        """Begin a function of so many 64-bit integers that returns one."""
        kind = ir.FunctionType(I64, [I64] * n_arguments)
        self.function = ir.Function(module, kind, name)
        self.function.linkage = "" if is_public else "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.when = self.builder.if_then
        self.arguments = [Int(self, a) for a in self.function.args]

    def integer(self, value: Any) -> Int:
        """A constant, or the same integer."""
        return value if isinstance(value, Int) else Int(self, value)

    def call(self, function: Any, *arguments: Any) -> None:
        """Call another function."""
        self.builder.call(function, [self.integer(a).value for a in arguments])

    def function_at(self, address: Int, n_arguments: int) -> Any:
        """A function of 64-bit integers, or of addresses."""
        return self._pointer(address, ir.FunctionType(I64, [I64] * n_arguments))

    def address_of(self, thing: Any) -> Int:
        """Of a function, a global variable or a local one."""
        return Int(self, self.builder.ptrtoint(thing, I64))

    def words(self, n: int) -> Int:
        """The address of room for so many 64-bit integers, as long as the function runs."""
        with self.builder.goto_entry_block():
            return self.address_of(self.builder.alloca(I64, n))

    def store_words(self, address: Int, *values: Any) -> None:
        """Write 64-bit integers, one after the other."""
        for i, value in enumerate(values):
            self.store(self.integer(value).value, address + 8 * i, 8)

    def atomic(self, operation: str, address: Int, value: Any) -> Int:
        """Change the integer at an address in one step. **Returns:** what it was."""
        place, value = self._pointer(address, I64), self.integer(value).value
        return Int(self, self.builder.atomic_rmw(operation, place, value, "seq_cst"))

    def finish(self) -> ir.Function:
        """End the function: it returns 0."""
        self.builder.ret(I64(0))
        return self.function

    def load(self, address: Int, kind: ir.Type, align: int = 1) -> Any:
        """What is at an address."""
        return self.builder.load(self._pointer(address, kind), align=align)

    def word(self, address: Int, place: int = 0) -> Int:
        """The 64-bit integer so many places on."""
        return Int(self, self.load(address + 8 * place, I64, 8))

    def number(self, address: Int, place: Any) -> Int:
        """The 32-bit integer so many places on."""
        found = self.load(address + self.integer(place) * 4, I32, 4)
        return Int(self, self.builder.sext(found, I64))

    def store(self, value: Any, address: Int, align: int = 1) -> None:
        """Write to an address."""
        self.builder.store(value, self._pointer(address, value.type), align=align)

    def prefetch(self, address: Int) -> None:
        """Ask for memory before it is needed; an address where there is none does no harm."""
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        to_read, into_second_cache, data = I32(0), I32(2), I32(1)
        arguments = [self._pointer(address, I8), to_read, into_second_cache, data]
        self.builder.call(intrinsic(self, "llvm.prefetch.p0", kind), arguments)

    def _pointer(self, address: Int, kind: ir.Type) -> Any:
        return self.builder.inttoptr(address.value, kind.as_pointer())

    def least(self, a: Any, b: Any) -> Int:
        """The smaller of two integers."""
        a, b = self.integer(a), self.integer(b)
        return Int(self, self.builder.select(a < b, a.value, b.value))

    def most(self, a: Any, b: Any) -> Int:
        """The larger of two integers."""
        a, b = self.integer(a), self.integer(b)
        return Int(self, self.builder.select(a < b, b.value, a.value))

    def variable(self, start: Any) -> Any:
        """A place for what changes in a loop: LLVM keeps it in a register."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(start.type)
        self.builder.store(start, place)
        return place

    def get(self, variable: Any) -> Any:
        """What a variable holds."""
        return self.builder.load(variable)

    def set(self, variable: Any, value: Any) -> None:
        """Give a variable another value."""
        self.builder.store(value, variable)

    @contextlib.contextmanager
    def range(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Int]:
        """A loop; its value is the index."""
        place = self.variable(self.integer(start).value)
        with self.repeat(lambda: Int(self, self.get(place)) < stop):
            index = Int(self, self.get(place))
            yield index
            self.set(place, (index + step).value)

    @contextlib.contextmanager
    def repeat(self, condition: Callable[[], Any]) -> Iterator[None]:
        """A loop that is run while a condition holds, which is written at its head."""
        head, body, end = (self.function.append_basic_block(n) for n in ("head", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition(), body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(end)

    def call_one(self, count: Int, functions: list[ir.Function], *arguments: Any) -> None:
        """Call the first, the second, ... of some functions."""
        for i, function in enumerate(functions, start=1):
            with self.when(count == i):
                self.call(function, *arguments)


def splat(code: Code, number: Any, lanes: int) -> Any:
    """The number in every lane of a vector."""
    none = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = code.builder.insert_element(none, number, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return code.builder.shuffle_vector(first, none, zeros)


def widened(code: Code, halves: Any) -> Any:
    """bfloat16 numbers, given as bits, as float32: they are the upper halves of these."""
    words, floats, sixteen = I32, F32, 16
    if isinstance(halves.type, ir.VectorType):
        n = halves.type.count
        words, floats, sixteen = ir.VectorType(I32, n), ir.VectorType(F32, n), [16] * n
    bits = code.builder.shl(code.builder.zext(halves, words), ir.Constant(words, sixteen))
    return code.builder.bitcast(bits, floats)


def multiply_add(code: Code, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    builder: Any = code.builder
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, c, flags=("contract",))


def add_lanes(code: Code, vector: Any) -> Any:
    """The sum over a vector's lanes, by halves."""
    kind = ir.FunctionType(F32, [F32, vector.type])
    add = intrinsic(code, f"llvm.vector.reduce.fadd.v{vector.type.count}f32", kind)
    return code.builder.call(add, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))


def intrinsic(code: Code, name: str, kind: ir.FunctionType) -> ir.Function:
    """One of LLVM's own functions."""
    return code.function.module.globals.get(name) or ir.Function(code.function.module, kind, name)
