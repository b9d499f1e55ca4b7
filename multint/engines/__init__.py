"""Running a cell's step over time.

`scan(cell, xs, state)` is defined by the loop in `loop.py`. The engine `fused` computes the same from the step itself,
traced once to a graph, in the way that makes the vendors' recurrent layers fast. Its rooms, in the order in which a
step goes through them:

1. `dispatch.py` is what callers see: it asks whether what it is given fits and whether compiling pays (`checks.py`),
   and falls back or raises. `explanation.py` says how a scan runs.
2. `guarded.py` has torch's own tracer read the step. Its guards say at each call whether the graph still holds, and
   which tensors of the cell the graph takes now. The step is never run to look at it. `step.py` keeps that for each
   kind of call.
3. `capture.py` turns that graph into one of ATen operations with the number of rows left open, and refuses what a graph
   cannot hold: random numbers, branches on values, gradients of the step's own. `decompositions.py` and
   `convolutions.py` bring it to its plainest form.
4. `plan.py` classifies each operation: does it depend on parameters only, on the input, or on the state? The products
   of the input with matrices leave the loop: one product for the rows of many steps (*hoisted*). The products of
   state-dependent values with loop-invariant matrices are the *stages*. What is left between them is row-wise
   pointwise code, cut into *pieces*. A field of the state that the step gives back as it came is one value for all
   steps; what depends on such fields alone is computed once.
5. `lowering.py` writes that down as a schedule (`schedule.py`): named buffers, and instructions for one step forward
   and one step backward. The reverse step carries the cotangents of the states and leaves, for all steps, those of the
   streams and of all products. A vector's gradient is summed on the way. A product over the rows of many steps gives
   each matrix its gradient, and another one what a hoisted product multiplied.
6. `program.py` keeps the schedules of a plan. It takes a step only where each piece can be written as a function of one
   row: what has one cannot mix the rows of a batch. And it chooses what runs a loop. `native/` makes one C++ function
   of it, for float32 and float64 on CPUs and any number of steps and rows. All others are run step by step from Python,
   by kernels that Inductor compiles (`kernel.py`): on accelerators, in half precision, or without a C++ compiler, where
   they run op by op. At its first use, `proof.py` compares either with autograd.
7. `run.py` runs a program: what is before its loops by autograd, and the loops as one operation of autograd, whose two
   passes are in `sections.py`. `by_autograd.py` says which results have a gradient, and which arguments it reaches.

`tables.py` has all that is kept from call to call. `private.py` is all that this package uses of torch without torch's
promise.

The schedule of an MI-LSTM, as `explain(LSTMCell(128, 512), x)` prints it, without sizes and with short names:

    once a call:                W, U = kernel(gates.x_projection.weight, gates.z_projection.weight)
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

from multint.engines.dispatch import scan
from multint.engines.explanation import Explanation, explain, precompile

__all__ = ["Explanation", "explain", "precompile", "scan"]
