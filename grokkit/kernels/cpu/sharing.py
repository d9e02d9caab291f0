"""Sharing a product between the threads of XLA's own pool.

A product is cut into pieces, of which whoever is free takes the next. The thread that brought the
product never waits for a helper that has not begun: one that comes late finds nothing to do, or
helps with the next product. One product is shared at a time; another's thread works alone meanwhile,
as the other virtual devices' threads do.
"""

from typing import Any

from llvmlite import ir

from grokkit.kernels.cpu.code import I32, I64, Code, Int

_LEFT, _DONE, _BUSY, _HELPERS, _WORK = 0, 16, 32, 48, 64
"""Places in the state, some apart so that threads do not wait for each other's cache lines: how
many pieces nobody has taken, how many are done, whether there is a product, how many helpers are
asked for or at work; and the product."""
SIZE = 6
"""Words that describe a product."""
_ASKS = 500  # how often a helper asks in vain before it ends: some tenth of a millisecond
_POOL_SCHEDULE = 17  # place in XLA_FFI_Api


def write(module: ir.Module, piece: ir.Function) -> ir.Function:
    """A function that runs a product's pieces: of the address of its `SIZE` words, how many pieces,
    how many threads, XLA's api and context.

    `piece` takes the address of the product's words, and which piece.
    """
    kind = ir.ArrayType(I64, _WORK + SIZE)
    state: Any = ir.GlobalVariable(module, kind, "shared_work")
    state.linkage, state.initializer, state.align = "internal", ir.Constant(kind, None), 64
    wait = ir.Function(module, ir.FunctionType(I32, []), "sched_yield")
    helper = _helper(module, state, piece, wait)

    code = Code(module, "share", 5)
    work, pieces, threads, api, context = code.arguments
    at = code.address_of(state)
    is_mine = code.variable(ir.IntType(1)(0))
    with code.when(code.builder.and_(code.integer(1) < threads, code.integer(1) < pieces)):
        code.set(is_mine, code.atomic("xchg", at + 8 * _BUSY, 1) == 0)
    with code.builder.if_else(code.get(is_mine)) as (together, alone):
        with alone, code.range(0, pieces) as i:
            code.call(piece, work, i)
        with together:
            code.store_words(at + 8 * _WORK, *(code.word(work, i) for i in range(SIZE)))
            code.atomic("xchg", at + 8 * _DONE, 0)
            code.atomic("xchg", at + 8 * _LEFT, pieces)
            request, size, extension, data = code.words(5), 40, 0, 0
            code.store_words(request, size, extension, context, code.address_of(helper), data)
            wanted = threads - 1 - code.atomic("add", at + 8 * _HELPERS, 0)
            with code.range(0, wanted):
                code.atomic("add", at + 8 * _HELPERS, 1)
                code.call(code.function_at(code.word(api, _POOL_SCHEDULE), 1), request)
            _take_pieces(code, at, piece)
            with code.repeat(lambda: code.atomic("add", at + 8 * _DONE, 0) < pieces):
                code.builder.call(wait, [])
            code.atomic("xchg", at + 8 * _BUSY, 0)
    return code.finish()


def _helper(module: ir.Module, state: Any, piece: ir.Function, wait: ir.Function) -> ir.Function:
    """What a thread of the pool runs. It stays for a moment after each product: to wake a thread
    takes as long as a small product."""
    code = Code(module, "help", 1)
    at, asked = code.address_of(state), code.variable(I64(0))
    with code.repeat(lambda: Int(code, code.get(asked)) < _ASKS):
        code.set(asked, (Int(code, code.get(asked)) + 1).value)
        with code.when(code.integer(0) < code.atomic("add", at + 8 * _LEFT, 0)):
            code.set(asked, I64(0))
            _take_pieces(code, at, piece)
        code.builder.call(wait, [])
    code.atomic("add", at + 8 * _HELPERS, -1)
    return code.finish()


def _take_pieces(code: Code, at: Int, piece: ir.Function) -> None:
    """Run pieces of the present product until none is left."""
    with code.repeat(lambda: code.integer(0) < code.atomic("add", at + 8 * _LEFT, 0)):
        left = code.atomic("add", at + 8 * _LEFT, -1)
        # The product cannot end before a piece that is taken does.
        with code.when(code.integer(0) < left):
            code.call(piece, at + 8 * _WORK, left - 1)
            code.atomic("add", at + 8 * _DONE, 1)
