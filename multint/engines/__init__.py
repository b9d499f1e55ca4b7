"""Running a cell's step over time.

`scan(cell, xs, state)` is defined by the loop in `loop.py`. The engine `fused` computes the same from the step itself,
traced once to a graph, in the way that makes the vendors' recurrent layers fast:

1. `trace.py` turns the step into a graph of ATen operations with the number of rows left open.
2. `plan.py` classifies each operation: does it depend on parameters only, on the input, or on the state? The products
   of the input with matrices leave the loop: one product over all T·B rows (*hoisted*; its result is a *stream*). The
   products of state-dependent values with loop-invariant matrices are the *stages*. What is left between them is
   row-wise pointwise code, cut into *pieces*.
3. `kernel.py` compiles each piece, and its vector-Jacobian product, for any number of rows.
4. `fused.py` runs the loop forward: for each stage its left-hand side, then the product, and last the new state. It
   keeps the states and what goes into the stages and comes out of them, q; activations are computed again. The reverse
   loop carries the cotangents of the states and leaves, for all steps, those of the streams and of q; a vector's
   gradient is summed on the way. Then one product over all T·B rows gives each recurrent matrix its gradient: that of
   a stage is never accumulated in the loop. Gradients of the input and its matrices follow outside, by autograd.
5. `engine.py` chooses, keeps what was traced, and cuts a scan in time where it would keep more than the memory budget.

The plan of an MI-LSTM, as `explain(LSTMCell(128, 512), x)` prints it, has one hoisted product (Wx of the four gates),
one stage (Uh of the four gates), and one piece (the integrator, the gates and the new state).
"""

from multint.engines.choice import Explanation, explain, scan

__all__ = ["Explanation", "explain", "scan"]
