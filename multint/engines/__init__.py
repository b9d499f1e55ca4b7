"""Running a cell's step over time.

`scan(cell, xs, state)` is defined by the loop in `loop.py`. The engine `fused` computes the same from the step itself,
traced once to a graph, in the way that makes the vendors' recurrent layers fast. Its rooms, in the order in which a
step goes through them:

1. `reads.py` walks all that the step can read: that gives the key under which `cache.py` keeps programs, and the
   copy of the cell (`copies.py`) on which the step is tried.
2. `capture.py` turns the step into a graph of ATen operations with the number of rows left open, `passes.py` brings the
   graph to its plainest form, and `legality.py` and `trials.py` refuse what a graph cannot hold, or gets wrong.
3. `plan.py` classifies each operation: does it depend on parameters only, on the input, or on the state? The products
   of the input with matrices leave the loop: one product for the rows of many steps (*hoisted*). The products of
   state-dependent values with loop-invariant matrices are the *stages*, and so are those of a value that goes by the
   number of rows, which is another one for the rows of many steps. What is left between them is row-wise
   pointwise code, cut into *pieces*.
4. `lowering.py` writes that down as a schedule (`schedule.py`): named buffers, and instructions for one step forward
   and one step backward. The reverse step carries the cotangents of the states and leaves, for all steps, those of the
   streams and of all products. A vector's gradient is summed on the way. A product over the rows of many steps gives
   each matrix its gradient, and another one what a hoisted product multiplied.
5. `program.py` holds the schedules of a plan, and `executor.py` runs one: its loops as one operation of autograd, what
   is before them under autograd itself; `reach.py` says which results have a gradient, and which arguments it reaches.
   A loop is run by one of two executors. `native.py` makes one C++ function of a
   loop, any number of steps and rows: the `cpp` files write its pieces, `native.h` has its products and its split over
   threads, and `machine.py` compiles it. `stepwise.py` runs all others step by step from Python, by the pieces that
   `kernel.py` has Inductor compile: pieces with other operations, in other dtypes, or without a compiler.
6. `choice.py` is what callers see: it chooses, falls back and explains. `budget.py` cuts a scan in time where it would
   keep too much. `private.py` is all that this package uses of torch without torch's promise.

The schedule of an MI-LSTM, as `explain(LSTMCell(128, 512), x)` prints it, without sizes and with short names:

    once, of the parameters:    W, U = kernel(gates.x_projection.weight, gates.z_projection.weight)
    for many steps at once:     Wx[:] = x[:] @ W
    each step t:                Uh[t] = h[t] @ U
                                h[t+1], c[t+1] = kernel(alpha, beta1, beta2, bias, c[t], Wx[t], Uh[t])
    each step t backward:       d_c[t], d_Wx[t], d_Uh[t], +rows(d_alpha), …
                                    = kernel(alpha, …, c[t], Wx[t], Uh[t], d_h[t+1], d_c[t+1], d_output[t])
                                d_h[t] = d_Uh[t] @ Uᵀ
    for many steps at once,     d_x[:] = d_Wx[:] @ Wᵀ
      backward:                 d_W = x[:]ᵀ @ d_Wx[:]
                                d_U = h[:]ᵀ @ d_Uh[:]
    once, after the last:       d_alpha = Σ rows(d_alpha), …

Activations are not kept: the backward kernel computes them again from Wx, Uh and the states, which is cheaper than
storing four gates. Nor are d_Wx and d_Uh there for more steps than a native loop takes at a time.
"""

from multint.engines.choice import Explanation, explain, precompile, scan

__all__ = ["Explanation", "explain", "precompile", "scan"]
