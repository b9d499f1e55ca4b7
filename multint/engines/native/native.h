// What every native loop is compiled with: vectors, functions of numbers, packed products, and the split over threads.
//
// A loop computes in one type, `real`: double where DOUBLE is defined, else float. Constants such as 0.5f stand for
// themselves in both, since float has them exactly.
//
// It includes no header of torch: those alone would take the compiler many seconds.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#if defined(DOUBLE)
typedef double real;
typedef int64_t Bits;
constexpr int FRACTION = 52, BIAS = 1023;  // of the format: bits of a fraction, and what is added to an exponent
#else
typedef float real;
typedef int32_t Bits;
constexpr int FRACTION = 23, BIAS = 127;
#endif

#if defined(__AVX512F__)
// Bytes of a vector; and rows of a tile, whose sums are two registers a row: 24 of 32 here, and 12 of 16 below, which
// leaves enough for the matrix and the left side.
constexpr int BYTES = 64, MOST_ROWS = 12;
#elif defined(__AVX__)
constexpr int BYTES = 32, MOST_ROWS = 6;
#else
constexpr int BYTES = 16, MOST_ROWS = 6;
#endif
constexpr int WIDTH = BYTES / sizeof(real);  // numbers of a vector
constexpr int PANEL = 2 * WIDTH;             // columns of a packed matrix that lie together
constexpr int AHEAD = 2048 / (2 * BYTES);    // rows of a panel that are fetched before they are needed: 2 KiB
constexpr int LINE = 64 / BYTES;             // vectors of a line of the cache

typedef real Vector __attribute__((vector_size(BYTES)));

// ---- Functions of one number, without branches, so that loops over them become vector code.

// 2^n for a whole n from −BIAS, which gives 0, to BIAS + 1, which gives infinity.
static inline real power_of_two(int32_t n) { return __builtin_bit_cast(real, ((Bits)n + BIAS) << FRACTION); }

// e^r − 1 for |r| ≤ ln 2 / 2, as r + r² q(r), where q is near (e^r − 1 − r) / r².
#if defined(DOUBLE)
// Taylor's series: what is left out is r^14 / 14! and less, 2e-17 of the result at most.
static inline real less_one(real r) {
  real q = 1.0 / 6227020800;
  q = q * r + 1.0 / 479001600;
  q = q * r + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 1.0 / 2;
  return q * (r * r) + r;
}
#else
// The q of degree 4 whose largest relative error of e^r is least, 3e-9. To find it again, fit it by least squares at
// some thousand Chebyshev nodes, weighted by (r² / e^r)², multiply each weight by the error there, and fit again, until
// all largest errors are alike (Lawson's algorithm).
static inline real less_one(real r) {
  real q = 1.381453825160861e-3f;
  q = q * r + 8.36874544620514e-3f;
  q = q * r + 4.166838899254799e-2f;
  q = q * r + 1.666652113199234e-1f;
  q = q * r + 4.999999403953552e-1f;
  return q * (r * r) + r;
}
#endif

// x − n ln 2, where n ln 2 is taken off in two parts. The first has so few digits that its product with n is exact.
#if defined(DOUBLE)
static inline real reduced(real x, real n) { return (x - n * 0x1.62e42fefa38p-1) + n * -5.497923018708371e-14; }
constexpr real LEAST = -746.0, MOST = 710.0, ONE_FROM = 19.1;
#else
static inline real reduced(real x, real n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }
constexpr real LEAST = -104.0f, MOST = 89.0f, ONE_FROM = 9.1f;
#endif
// Below LEAST e^x is 0, beyond MOST it is infinity, and from ONE_FROM on tanh is 1, each by rounding.
constexpr real LOG2_E = 1.4426950408889634;

static inline real exponential(real x) {
  const real bounded = x > MOST ? MOST : x < LEAST ? LEAST : x;
  const real n = std::rint(bounded * LOG2_E);
  const int32_t half = (int32_t)n >> 1;  // in two factors, since the largest results have none in one
  return (less_one(reduced(bounded, n)) + 1.0f) * power_of_two(half) * power_of_two((int32_t)n - half);
}

static inline real logistic(real x) {
  return 1.0f / (1.0f + exponential(-x));
}

// With m = e^2|x| − 1 it is m / (m + 2) where x is small, which keeps the digits of a small x, and 1 − 2 / (m + 2) beyond
// 1, which keeps those of the derivative 1 − y²: neither form has both.
static inline real hyperbolic_tangent(real x) {
  const real size = std::fabs(x), bounded = size > ONE_FROM ? ONE_FROM : size;
  const real n = std::rint(bounded * (2.0f * LOG2_E)), r = reduced(2.0f * bounded, n);
  const real power = power_of_two((int32_t)n), m = power * less_one(r) + (power - 1.0f);
  const bool small = bounded < 1.0f;
  const real y = (small ? m : -2.0f) / (m + 2.0f) + (small ? 0.0f : 1.0f);
  return std::copysign(y, x);
}

static inline real maximum(real a, real b) { return a != a || a > b ? a : b; }

static inline real minimum(real a, real b) { return a != a || a < b ? a : b; }

// The remainder of a division that rounds down: it has the sign of b.
static inline real modulo(real a, real b) {
  const real c = std::fmod(a, b);
  return c != 0.0f && (b < 0.0f) != (c < 0.0f) ? c + b : c;
}

// ---- Where a value stands: at a step, in a row, and for a part of the rows where each part sums up its own.

struct Slot {
  char *base;
  int64_t step, row, part;  // distances in bytes
  int64_t turns;            // 1: two values are there, the even steps' and the odd steps'
  int64_t later;            // steps after the present one
};

struct Part {
  int64_t number, count;     // of the parts, each a thread's
  int64_t first, last;       // its rows
  int64_t rows;              // of all parts
  bool by_columns;           // products are split by columns, and not by rows
};

template <class T> static inline T *at(const Slot &slot, const Part &part, int64_t t, int64_t row) {
  const int64_t step = slot.turns ? (t + slot.later) & 1 : t + slot.later;
  return (T *)(slot.base + step * slot.step + row * slot.row + part.number * slot.part);
}

// ---- Products of a few rows with a matrix that is used at every step.

// The matrix (inner, columns) as panels, each (inner, PANEL), the last one filled up with zeros.
extern "C" void pack(const real *matrix, int64_t by_row, int64_t by_column, int64_t inner, int64_t columns,
                     real *packed, int64_t threads) {
  const int64_t panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel) {
    real *to = packed + panel * inner * PANEL;
    const real *from = matrix + panel * PANEL * by_column;
    const int64_t there = columns - panel * PANEL < PANEL ? columns - panel * PANEL : PANEL;
    if (there < PANEL) std::memset(to, 0, sizeof(real) * inner * PANEL);
    if (by_column == 1) {
      for (int64_t k = 0; k < inner; ++k) std::memcpy(to + k * PANEL, from + k * by_row, sizeof(real) * there);
    } else {
      for (int64_t j = 0; j < there; ++j)
        for (int64_t k = 0; k < inner; ++k) to[k * PANEL + j] = from[k * by_row + j * by_column];
    }
  }
}

extern "C" int64_t panel_columns() { return PANEL; }

// ROWS rows times PANELS panels: all sums stay in registers over the whole inner dimension.
template <int ROWS, int PANELS>
static void tile(const real *left, const real *packed, real *result, int64_t inner, int64_t columns, int64_t there,
                 bool adds) {
  Vector sums[ROWS][2 * PANELS] = {};
  for (int64_t k = 0; k < inner; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * PANELS; ++v) {
      const real *from = packed + ((v / 2) * inner + k) * PANEL + (v % 2) * WIDTH;
      // A large matrix comes from afar at every step, and the processor itself fetches no further than a page.
      if (v % LINE == 0) __builtin_prefetch(from + AHEAD * PANEL);
      Vector some;
      std::memcpy(&some, from, sizeof some);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r][v] += left[r * inner + k] * some;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    real *to = result + r * columns;
    if (there == PANELS * PANEL) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * PANELS; ++v) {
        Vector some = {};
        if (adds) std::memcpy(&some, to + v * WIDTH, sizeof some);
        some += sums[r][v];
        std::memcpy(to + v * WIDTH, &some, sizeof some);
      }
    } else {
      real line[2 * PANELS * WIDTH];
      std::memcpy(line, sums[r], sizeof line);
      for (int64_t j = 0; j < there; ++j) to[j] = adds ? to[j] + line[j] : line[j];
    }
  }
}

// A few rows leave registers free for several panels, whose sums hide each other's latency.
template <int ROWS> constexpr int panels_of() { return ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1; }

template <int ROWS>
static int64_t some_panels(const real *left, const real *packed, real *result, int64_t inner, int64_t columns,
                           int64_t panel, int64_t last, bool adds) {
  constexpr int PANELS = panels_of<ROWS>();
  const int64_t start = panel * PANEL;
  const real *from = packed + start * inner;
  if (panel + PANELS <= last) {
    const int64_t there = columns - start < PANELS * PANEL ? columns - start : PANELS * PANEL;
    tile<ROWS, PANELS>(left, from, result + start, inner, columns, there, adds);
    return PANELS;
  }
  const int64_t there = columns - start < PANEL ? columns - start : PANEL;
  tile<ROWS, 1>(left, from, result + start, inner, columns, there, adds);
  return 1;
}

template <int ROWS>
static int64_t rows_of(int64_t rows, const real *left, const real *packed, real *result, int64_t inner,
                       int64_t columns, int64_t panel, int64_t last, bool adds) {
  constexpr int FEWER = ROWS > 1 ? ROWS - 1 : 1;
  if (rows < ROWS && ROWS > 1)
    return rows_of<FEWER>(rows, left, packed, result, inner, columns, panel, last, adds);
  return some_panels<ROWS>(left, packed, result, inner, columns, panel, last, adds);
}

// result (rows, columns) = or += left (rows, inner) @ the packed matrix (inner, columns).
static void product(const Part &part, const real *left, const real *packed, real *result, int64_t inner,
                    int64_t columns, bool adds) {
  int64_t first = part.first, last = part.last, panel = 0, panels = (columns + PANEL - 1) / PANEL;
  if (part.by_columns) {
    first = 0, last = part.rows;
    panel = panels * part.number / part.count, panels = panels * (part.number + 1) / part.count;
#pragma omp barrier
  }
  const int64_t blocks = (last - first + MOST_ROWS - 1) / MOST_ROWS;
  while (panel < panels) {
    int64_t done = 1;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = first + (last - first) * block / blocks, to = first + (last - first) * (block + 1) / blocks;
      done = rows_of<MOST_ROWS>(to - from, left + from * inner, packed, result + from * columns, inner, columns, panel,
                                panels, adds);
    }
    panel += done;
  }
  if (part.by_columns) {
#pragma omp barrier
  }
}

// What a part sums up over its rows and steps stands before the total, to which it is added from time to time: a single
// sum of thousands of numbers would lose digits.
static void add_to_total(real *sum, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[count + i] += sum[i];
  std::memset(sum, 0, sizeof(real) * count);
}

constexpr int64_t SUMMED_AT_ONCE = 16;  // rows, or nearly: few for the digits, and many beside the cost of a total

// Call body(part) for each part of the rows, each by its own thread.
template <class Body> static void in_parts(int64_t threads, int64_t rows, bool by_columns, const Body &body) {
  if (threads == 1) {
    body(Part{0, 1, 0, rows, rows, false});
    return;
  }
#pragma omp parallel num_threads((int)threads)
  {
    const int64_t number = omp_get_thread_num(), count = omp_get_num_threads();
    body(Part{number, count, rows * number / count, rows * (number + 1) / count, rows, by_columns});
  }
}
